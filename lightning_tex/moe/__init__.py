"""The mixture-of-experts layer and its parts."""

from lightning_tex.moe.dispatch import Arrived, Dispatcher, DispatchMetadata
from lightning_tex.moe.layer import MoE
from lightning_tex.moe.losses import auxiliary_loss
from lightning_tex.moe.router import Route, Router, SoftmaxRouter

__all__ = [
    "Arrived",
    "DispatchMetadata",
    "Dispatcher",
    "MoE",
    "Route",
    "Router",
    "SoftmaxRouter",
    "auxiliary_loss",
]
