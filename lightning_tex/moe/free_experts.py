"""Experts that compute nothing and are nowhere: a token that chooses one does not travel (MoE++, arXiv 2410.07348)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_tex.moe.router import Route
from lightning_tex.parallel.errors import UserValueError

# T tokens, E experts that compute, k choices per token


@dataclass(frozen=True)
class FreeExperts:
    """Behind the E experts that compute, zero experts give nothing, and identity experts the token itself.

    Routers and their losses know them as any others.

    Args:
        first: E, the number of the first of them.
        zero: how many give nothing.
        identity: how many give the token.

    Raises:
        ValueError: numbers below 0.
    """

    first: int
    zero: int
    identity: int

    def __post_init__(self) -> None:
        if self.zero < 0 or self.identity < 0:
            raise UserValueError(f"zero_experts={self.zero}, identity_experts={self.identity}; legal: 0, or above")

    @property
    def count(self) -> int:
        """Of both kinds."""
        return self.zero + self.identity

    def taken_out(self, route: Route) -> tuple[Route, Tensor]:
        """The route to the experts that compute, and how much of a token its identity experts give: [T, 1]."""
        identity = (route.indices >= self.first + self.zero) & (route.indices < self.first + self.count)
        kept = (route.weights * identity).sum(-1, keepdim=True)
        free = route.indices >= self.first
        indices, weights = route.indices.masked_fill(free, self.first), route.weights.masked_fill(free, 0)
        return route._replace(indices=indices, weights=weights), kept

    def given(self, x: Tensor, kept: Tensor) -> Tensor:  # [.., D], [T, 1] -> [.., D]
        """What identity experts give of the tokens."""
        return (x.reshape(-1, x.shape[-1]) * kept).to(x.dtype).view_as(x)
