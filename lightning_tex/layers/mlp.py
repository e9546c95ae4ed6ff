"""The two-matrix (gelu) and three-matrix (swiglu) feed-forward block, sharded over the tensor axis."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tex.layers.linear import ColumnParallelLinear, RowParallelLinear, require_divisible
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.sharding import TexModule

# Without a gate: gelu (by erf), gelu_tanh, relu. With one: silu, gelu or gelu_tanh of it times up; and gpt-oss's.
Activation = Literal["gelu", "gelu_tanh", "relu", "swiglu", "geglu", "geglu_tanh", "clamped_swiglu"]
GATED = frozenset(("swiglu", "geglu", "geglu_tanh", "clamped_swiglu"))
# Of clamped_swiglu (gpt-oss): the gate's sigmoid is of ALPHA times it, and both products are clamped.
ALPHA, LIMIT = 1.702, 7.0


def require_activation(activation: str) -> None:
    """Raise ``ValueError`` unless the activation is known."""
    if activation not in get_args(Activation):
        raise UserValueError(f"activation={activation!r}; legal: {', '.join(map(repr, get_args(Activation)))}")


def activated(activation: Activation, up: Tensor, gate: Tensor | None) -> Tensor:
    """What stands between the products, of those with up and gate."""
    if gate is None:
        return F.relu(up) if activation == "relu" else F.gelu(up, approximate=_approximate(activation))
    if activation == "clamped_swiglu":
        gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
        return gate * (ALPHA * gate).sigmoid() * (up + 1)
    return (F.silu(gate) if activation == "swiglu" else F.gelu(gate, approximate=_approximate(activation))) * up


def _approximate(activation: Activation) -> str:
    return "tanh" if activation.endswith("tanh") else "none"


class ParallelMLP(TexModule):
    """Feed-forward block with its hidden units sharded over the tensor axis: [.., dim] -> [.., dim].

    ``gelu``, ``gelu_tanh``, ``relu``: down(gelu(up(x))). ``swiglu``, ``geglu``, ``geglu_tanh``: down(silu(gate(x)) *
    up(x)), gate and up being separate matrices. ``clamped_swiglu``: gpt-oss's, down(g * sigmoid(1.702 g) * (u + 1)) of
    g = min(gate(x), 7) and u = up(x) clamped to -7 and 7.

    Args:
        dim: model width.
        hidden_dim: hidden width; divisible by the tensor axis.
        activation: one of these.
        bias: biases in all matrices.

    Raises:
        ValueError: unknown activation.
    """

    def __init__(self, dim: int, hidden_dim: int, activation: Activation = "gelu", bias: bool = False) -> None:
        super().__init__()
        require_activation(activation)
        self.hidden_dim, self.activation = hidden_dim, activation
        self.gate = ColumnParallelLinear(dim, hidden_dim, bias) if activation in GATED else None
        self.up = ColumnParallelLinear(dim, hidden_dim, bias)
        self.down: nn.Module = RowParallelLinear(hidden_dim, dim, bias)

    def check(self, name: str, layout: Layout) -> None:
        require_divisible(name, "hidden_dim", self.hidden_dim, layout)

    def forward(self, x: Tensor) -> Tensor:  # [.., D] -> [.., D]
        x = self.activation_layout.enter(x)
        up = self.up.columns(x)
        return self.down(activated(self.activation, up, None if self.gate is None else self.gate.columns(x)))
