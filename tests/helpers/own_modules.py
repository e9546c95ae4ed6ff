"""LightningModules that are no decoder: the recipe's, and one with experts of two sizes, wrapped and plain layers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tex.layers import ColumnParallelLinear, RMSNorm, RowParallelLinear
from lightning_tex.moe import MoE

RECIPES = Path(__file__).parents[2] / "recipes"
FEATURES = 16


def regression() -> L.LightningModule:
    """The module of ``recipes/own_module.py``."""
    if "own_module" not in sys.modules:
        spec = importlib.util.spec_from_file_location("own_module", RECIPES / "own_module.py")
        assert spec is not None and spec.loader is not None
        script = sys.modules["own_module"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
    return sys.modules["own_module"].Regression(FEATURES)


class Residual(nn.Module):
    """A layer of the user's around another: norm, layer, sum."""

    def __init__(self, dim: int, layer: nn.Module) -> None:
        super().__init__()
        self.norm, self.layer = RMSNorm(dim), layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.norm(x))


class TwoKinds(L.LightningModule):
    """Experts of two sizes, one with a capacity, one dropless, of which every token goes to every expert."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.frozen = nn.Linear(FEATURES, FEATURES).requires_grad_(False)
        self.up, self.down = ColumnParallelLinear(FEATURES, 2 * width), RowParallelLinear(2 * width, width)
        self.first = Residual(width, MoE(width, 24, num_experts=4, top_k=2, capacity_factor=1.25))
        self.second = Residual(
            width, MoE(width, 40, num_experts=8, top_k=8, activation="swiglu", load_balance_coefficient=0)
        )
        self.gathered = ColumnParallelLinear(width, 8, gather_output=True)
        self.scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:  # [T, FEATURES] -> [T]
        x = self.down(F.gelu(self.up(self.frozen(x))))
        x = self.second(self.first(x))
        return self.head(self.gathered(x) * self.scale).squeeze(-1)
