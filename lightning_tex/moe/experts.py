"""The experts' matrices, spread over the expert axis and cut over the expert_tensor axis."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tex.layers.mlp import Activation, require_activation
from lightning_tex.moe.dispatch import Arrived
from lightning_tex.parallel.initialization import by_index, draw_uniform_
from lightning_tex.parallel.replay import product_to_record
from lightning_tex.parallel.sharding import TexModule

# N rows, D model width, H hidden width, E experts, e experts held here (per rank: H/expert_tensor)


class Experts(TexModule):
    """E feed-forward blocks as stacked matrices: [N, D] rows grouped by expert -> [N, D].

    Cut over expert_tensor, each rank gives partial sums; the dispatcher sums them on the way home, and the input's
    partial gradients likewise.

    Args:
        dim: D.
        hidden_dim: H; divisible by the expert_tensor axis.
        num_experts: E; divisible by the expert axis.
        activation: ``"gelu"`` (two matrices) or ``"swiglu"`` (three).
    """

    axes = ("expert", "expert_tensor")
    cuts = {
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
            draw_uniform_(parameter, 1 / math.sqrt(boxes[name].whole[-1]), boxes[name])

    def forward(self, arrived: Arrived) -> Tensor:  # [N, D] -> [N, D]
        rows, sizes = arrived
        matrices = [self.up, self.down] if self.gate is None else [self.up, self.down, self.gate]
        if len(set(sizes)) == 1:
            return feed_forward(rows.view(len(sizes), sizes[0], self.dim), *matrices).flatten(0, 1)
        # Indexing matrices one by one, in place of unbind, would make a full-size gradient for each expert. Empty
        # groups are served like others: their gradient is zero, not missing.
        each = zip(rows.split(sizes), *(matrix.unbind() for matrix in matrices), strict=True)
        return torch.cat([feed_forward(*expert) for expert in each])

    def extra_repr(self) -> str:
        kind = "gelu" if self.gate is None else "swiglu"
        return f"{self.num_experts} x ({self.dim} -> {self.hidden_dim} -> {self.dim}), {kind}"


def feed_forward(rows: Tensor, up: Tensor, down: Tensor, gate: Tensor | None = None) -> Tensor:
    """One expert, or several alike as one batch: [.., n, D], [.., H, D], [.., D, H] -> [.., n, D].

    What they give goes home, which is recorded, and nowhere else.
    """
    hidden = rows @ up.mT
    hidden = F.gelu(hidden) if gate is None else F.silu(rows @ gate.mT) * hidden
    return product_to_record(hidden, down)
