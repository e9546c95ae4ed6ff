"""Tokens to their experts and back: what is sent where, and how it is put together again (paper sections 3 and 5.1)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_tex.moe.exchange import Lanes
from lightning_tex.moe.router import Route

# T tokens, D model width, E experts, e experts held here, P = E/e ranks on the expert axis, C capacity,
# k choices per token, t own tokens, n own choices, N rows at the experts


class Arrived(NamedTuple):
    """Rows at the experts held here: [N, D], grouped by expert, with the number of rows of each of the e experts."""

    rows: Tensor
    sizes: list[int]


@dataclass(frozen=True)
class Dispatcher(ABC):
    """The way to the experts and back.

    Args:
        num_experts: E.
        lanes: the axes of the way.
    """

    num_experts: int
    lanes: Lanes

    @abstractmethod
    def dispatch(self, x: Tensor, route: Route) -> tuple[Arrived, Any]:
        """Send [.., D] tokens to their experts. Returns what arrived here and what the way back needs.

        The dims before the last are T in all: a route's tokens are x's in their order.
        """

    @abstractmethod
    def combine(self, rows: Tensor, journey: Any) -> Tensor:
        """Bring [N, D] expert outputs back and sum them by their weights: [T, D]. An overflowed choice adds 0.

        The outputs are partial sums over the axis the experts are cut over; they are summed on the way.
        """

    @abstractmethod
    def overflow(self, journey: Any) -> Tensor:
        """How many choices overflowed their expert's capacity: a scalar, of this rank's tokens."""


def weighted_sum(outputs: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:  # [t * k, D], [t, k] -> [t, D]
    return (outputs.view(*weights.shape, outputs.shape[-1]) * weights[..., None]).sum(1).to(dtype)
