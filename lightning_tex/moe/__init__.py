"""The mixture-of-experts layer and its parts."""

from lightning_tex.moe.dispatch import Arrived, Dispatcher, DispatchMetadata
from lightning_tex.moe.layer import MoE
from lightning_tex.moe.losses import auxiliary_loss
from lightning_tex.moe.router import Route, Router
from lightning_tex.moe.routers import SigmoidRouter, SoftmaxRouter, step_is_over
from lightning_tex.moe.shared import SharedExpert

__all__ = [
    "Arrived",
    "DispatchMetadata",
    "Dispatcher",
    "MoE",
    "Route",
    "Router",
    "SharedExpert",
    "SigmoidRouter",
    "SoftmaxRouter",
    "auxiliary_loss",
    "step_is_over",
]
