"""The two-matrix (gelu) and three-matrix (swiglu) feed-forward block, sharded over the tensor axis."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tex.layers.linear import ColumnParallelLinear, RowParallelLinear, require_divisible
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.sharding import TexModule
from lightning_tex.parallel.topology import Layout

Activation = Literal["gelu", "swiglu"]


def require_activation(activation: str) -> None:
    """Raise ``ValueError`` unless the activation is known."""
    if activation not in get_args(Activation):
        raise UserValueError(f"activation={activation!r}; legal: {', '.join(map(repr, get_args(Activation)))}")


class ParallelMLP(TexModule):
    """Feed-forward block with its hidden units sharded over the tensor axis: [.., dim] -> [.., dim].

    ``gelu``: down(gelu(up(x))). ``swiglu``: down(silu(gate(x)) * up(x)), gate and up being separate matrices.

    Args:
        dim: model width.
        hidden_dim: hidden width; divisible by the tensor axis.
        activation: ``"gelu"`` or ``"swiglu"``.
        bias: biases in all matrices.

    Raises:
        ValueError: unknown activation.
    """

    def __init__(self, dim: int, hidden_dim: int, activation: Activation = "gelu", bias: bool = False) -> None:
        super().__init__()
        require_activation(activation)
        self.hidden_dim = hidden_dim
        self.gate = ColumnParallelLinear(dim, hidden_dim, bias) if activation == "swiglu" else None
        self.up = ColumnParallelLinear(dim, hidden_dim, bias)
        self.down: nn.Module = RowParallelLinear(hidden_dim, dim, bias)

    def check(self, name: str, layout: Layout) -> None:
        require_divisible(name, "hidden_dim", self.hidden_dim, layout)

    def forward(self, x: Tensor) -> Tensor:  # [.., D] -> [.., D]
        x = self.activation_layout.enter(x)
        up = self.up.columns(x)
        hidden = F.gelu(up) if self.gate is None else F.silu(self.gate.columns(x)) * up
        return self.down(hidden)
