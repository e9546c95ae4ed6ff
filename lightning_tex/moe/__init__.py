"""The mixture-of-experts layer and its parts."""

from lightning_tex.moe.dispatch import Arrived, Dispatcher, DispatchMetadata
from lightning_tex.moe.expert_choice import ExpertChoiceRouter
from lightning_tex.moe.free_experts import FreeExperts
from lightning_tex.moe.hash_router import HashRouter
from lightning_tex.moe.layer import MoE
from lightning_tex.moe.losses import auxiliary_loss
from lightning_tex.moe.own_experts import OwnExperts
from lightning_tex.moe.residual import ResidualBranch
from lightning_tex.moe.router import Route, Router
from lightning_tex.moe.router_replay import RouterDecisions, RouterReplay
from lightning_tex.moe.shared import SharedExpert
from lightning_tex.moe.sigmoid_router import SigmoidRouter
from lightning_tex.moe.sinkhorn import SinkhornRouter
from lightning_tex.moe.softmax_routers import GShardRouter, SoftmaxRouter, SwitchRouter
from lightning_tex.moe.steps import step_is_over
from lightning_tex.moe.tokens import Tokens

__all__ = [
    "Arrived",
    "DispatchMetadata",
    "Dispatcher",
    "ExpertChoiceRouter",
    "FreeExperts",
    "GShardRouter",
    "HashRouter",
    "MoE",
    "OwnExperts",
    "ResidualBranch",
    "Route",
    "Router",
    "RouterDecisions",
    "RouterReplay",
    "SharedExpert",
    "SigmoidRouter",
    "SinkhornRouter",
    "SoftmaxRouter",
    "SwitchRouter",
    "Tokens",
    "auxiliary_loss",
    "step_is_over",
]
