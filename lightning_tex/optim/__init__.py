"""The sharded, tiled optimizer (paper, section 4): ``tiled.py`` says which module does what in a step.

Public: the optimizer, which is also the one door to the gradients of a step, and what it is configured by.
"""

from lightning_tex.optim.by_pattern import optimized_parameters, scaled_groups, train_only
from lightning_tex.optim.combined import CombinedOptimizer
from lightning_tex.optim.muon import Muon
from lightning_tex.optim.muon_adamw import MuonAdamW, hidden_matrices
from lightning_tex.optim.reduction_stage import ReductionStage
from lightning_tex.optim.run_buffers import RunBuffers, require_sharable
from lightning_tex.optim.several import Stepped, as_one, one_by_one
from lightning_tex.optim.stand_in import users_own
from lightning_tex.optim.state_config import (
    OPTIMIZER_STATE_FORMATS,
    OptimizerStateConfig,
    OptimizerStateFormat,
    ZeroStage,
)
from lightning_tex.optim.tiled import TiledOptimizer

__all__ = [
    "OPTIMIZER_STATE_FORMATS",
    "CombinedOptimizer",
    "Muon",
    "MuonAdamW",
    "OptimizerStateConfig",
    "OptimizerStateFormat",
    "ReductionStage",
    "RunBuffers",
    "Stepped",
    "TiledOptimizer",
    "ZeroStage",
    "as_one",
    "hidden_matrices",
    "one_by_one",
    "optimized_parameters",
    "require_sharable",
    "scaled_groups",
    "train_only",
    "users_own",
]
