"""The experts' matrices, spread over the expert axis and cut over the expert_tensor axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tex.drawing import by_index, draw_uniform_
from lightning_tex.layers.mlp import Activation, require_activation
from lightning_tex.moe.dispatch import Arrived
from lightning_tex.placement import TexModule

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
        rows = arrived.rows
        up = grouped_product(rows, self.up, arrived.sizes)
        if self.gate is None:
            hidden = F.gelu(up)
        else:
            hidden = F.silu(grouped_product(rows, self.gate, arrived.sizes)) * up
        return grouped_product(hidden, self.down, arrived.sizes)

    def extra_repr(self) -> str:
        kind = "gelu" if self.gate is None else "swiglu"
        return f"{self.num_experts} x ({self.dim} -> {self.hidden_dim} -> {self.dim}), {kind}"


def grouped_product(rows: Tensor, weights: Tensor, sizes: Sequence[int]) -> Tensor:
    """Each group of rows times its own matrix: [N, in], [e, out, in] -> [N, out].

    Equal groups are one batched product. Unequal ones are a loop over unbound matrices, empty groups included (their
    gradient is zero, not missing); indexing ``weights[i]`` instead would make a full-size gradient for each.
    """
    if len(set(sizes)) == 1 and rows.is_cuda:
        return torch.bmm(rows.view(len(sizes), -1, rows.shape[-1]), weights.transpose(1, 2)).flatten(0, 1)
    groups = rows.split(list(sizes))
    return torch.cat([F.linear(group, w) for group, w in zip(groups, weights.unbind(), strict=True)])
