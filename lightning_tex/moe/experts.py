"""The experts' matrices, spread over the expert axis and sharded over the expert_tensor axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tex.layers.mlp import Activation, require_activation
from lightning_tex.moe.dispatch import Arrived
from lightning_tex.moe.exchange import Exchange, from_experts
from lightning_tex.parallel.initialization import by_index, init_uniform_
from lightning_tex.parallel.replay import products_then
from lightning_tex.parallel.sharding import TexModule

# N rows, D model width, H hidden width, E experts, e experts held here (per rank: H/expert_tensor)


class Experts(TexModule):
    """E feed-forward blocks as stacked matrices: [N, D] rows grouped by expert -> [t * k, D] outputs by choice.

    Sharded over expert_tensor, each rank computes partial sums; the exchange sums them on the way back, and the input's
    partial gradients likewise.

    Args:
        dim: D.
        hidden_dim: H; divisible by the expert_tensor axis.
        num_experts: E; divisible by the expert axis.
        activation: ``"gelu"`` (two matrices) or ``"swiglu"`` (three).
    """

    axes = ("expert", "expert_tensor")
    shard_dims = {
        "gate": {"expert": 0, "expert_tensor": 1},
        "up": {"expert": 0, "expert_tensor": 1},
        "down": {"expert": 0, "expert_tensor": 2},
    }
    gate: nn.Parameter | None

    def __init__(self, dim: int, hidden_dim: int, num_experts: int, activation: Activation = "gelu") -> None:
        super().__init__()
        require_activation(activation)
        self.dim, self.hidden_dim, self.num_experts = dim, hidden_dim, num_experts
        shape = (num_experts, hidden_dim, dim)
        self.gate = nn.Parameter(torch.empty(shape)) if activation == "swiglu" else None
        self.up = nn.Parameter(torch.empty(shape))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.reset_parameters()

    @by_index
    def reset_parameters(self) -> None:
        """Draw each expert as ``torch.nn.Linear`` would: uniform within 1/sqrt(input width)."""
        boxes = self.boxes()
        for name, parameter in self.named_parameters(recurse=False):
            init_uniform_(parameter, 1 / math.sqrt(boxes[name].full[-1]), boxes[name])

    def forward(self, arrived: Arrived, exchange: Exchange) -> Tensor:
        """What the experts give for the rows that arrived, brought back by the exchange: [N, D] -> [t * k, D].

        The last product and the way back are one operation, as what lies between is this rank's partial sums and, where
        a recomputation replays the way back, is not computed at all.
        """
        rows, sizes = arrived
        if len(set(sizes)) == 1:
            batch = rows.view(len(sizes), sizes[0], self.dim)
            products: Iterable[tuple[Tensor, Tensor]] = [(self._hidden(batch, self.up, self.gate), self.down)]
        else:
            # Indexing matrices one by one, in place of unbind, would make a full-size gradient for each expert. Empty
            # groups are served like others: their gradient is zero, not missing.
            ups = self.up.unbind()
            gates: Sequence[Tensor | None] = [None] * len(ups) if self.gate is None else self.gate.unbind()
            hidden = map(self._hidden, rows.split(sizes), ups, gates)
            products = zip(hidden, self.down.unbind(), strict=True)
        return products_then(products, lambda y: from_experts(y.reshape(-1, self.dim), exchange))

    @torch.no_grad()
    def own_outputs(self, arrived: Arrived) -> Iterator[Tensor]:
        """What the experts held here give by themselves, one after another: partial sums over expert_tensor."""
        rows, sizes = arrived
        for i, part in enumerate(rows.reshape(-1, self.dim).split(list(sizes))):
            gate = None if self.gate is None else self.gate[i]
            yield F.linear(self._hidden(part, self.up[i], gate), self.down[i])

    @staticmethod
    def _hidden(rows: Tensor, up: Tensor, gate: Tensor | None) -> Tensor:  # [.., n, D], [.., H, D] -> [.., n, H]
        hidden = rows @ up.mT
        return F.gelu(hidden) if gate is None else F.silu(rows @ gate.mT) * hidden

    def extra_repr(self) -> str:
        kind = "gelu" if self.gate is None else "swiglu"
        return f"{self.num_experts} x ({self.dim} -> {self.hidden_dim} -> {self.dim}), {kind}"
