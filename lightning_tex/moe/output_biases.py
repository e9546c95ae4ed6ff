"""Biases of the experts' outputs, added where the sums over a token's choices are: no row has to travel for them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_tex.moe.router import Route
from lightning_tex.parallel.initialization import by_index, init_uniform_
from lightning_tex.parallel.sharding import TexModule

# T tokens, D model width, H hidden width, E experts, k choices per token


class OutputBiases(TexModule):
    """A bias of each expert's output, weighted as the output is: a route of T tokens -> [T, D].

    All of them are on every rank, as a token's experts may be anywhere.

    Args:
        num_experts: E.
        dim: D.
        hidden_dim: H, by which they are drawn.
    """

    hidden = False  # rows are vectors, one of each expert

    def __init__(self, num_experts: int, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    @by_index
    def reset_parameters(self) -> None:
        """Draw as ``torch.nn.Linear`` does: uniform within 1/sqrt(H)."""
        init_uniform_(self.weight, 1 / math.sqrt(self.hidden_dim), self.boxes()["weight"])

    def forward(self, route: Route, dtype: torch.dtype) -> Tensor:
        """The sum over a token's choices.

        Args:
            route: all of its choices are served.
            dtype: of the tokens.
        """
        experts = len(self.weight)
        # One column more for choices that are masked.
        of_each = route.weights.new_zeros(len(route.weights), experts + 1).scatter(1, route.indices, route.weights)
        return of_each[:, :experts].to(dtype) @ self.weight.to(dtype)
