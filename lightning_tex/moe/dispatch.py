"""The seam of dispatch: tokens to their experts, and what comes back put together (paper sections 3 and 5.1).

    route = router(tokens)
    arrived, metadata = dispatcher.dispatch(tokens, route)
    y = dispatcher.combine(experts(arrived, metadata.exchange), metadata)

A further way to dispatch is a further :class:`Dispatcher`, which a subclass of the layer chooses in
:meth:`~lightning_tex.moe.MoE.make_dispatcher`. ``capacity`` decides which choices overflow their expert,
``dropless`` serves all, ``sequence_parallel`` has a capacity for tokens that are split already. The axes that they
pass, and duplicate-token dropping, are the table of ``expert_axes``; ``exchange`` moves the rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_tex.moe.exchange import Exchange
from lightning_tex.moe.expert_axes import ExpertAxes
from lightning_tex.moe.router import Route

# T tokens, D model width, E experts, e experts held here, k choices per token, t own tokens, N rows at the experts


class Arrived(NamedTuple):
    """Rows at the experts held here: [N, D], grouped by expert, with the number of rows of each of the e experts."""

    rows: Tensor
    sizes: list[int]


@dataclass(frozen=True)
class DispatchMetadata:
    """What the way back needs.

    Args:
        exchange: brings the rows back.
        weights: [t, k], what the outputs of the choices are multiplied with.
        dtype: of the tokens.
        overflowed: how many choices overflowed their expert's capacity, of this rank's tokens: a scalar.
        split_tokens: tokens of each rank of the split axis, where they are gathered again.
    """

    exchange: Exchange
    weights: Tensor
    dtype: torch.dtype
    overflowed: Tensor
    split_tokens: list[int] | None = None

    def weighted_sum(self, outputs: Tensor) -> Tensor:
        """The outputs of each token's choices, summed by their weights: [t * k, D] -> [t, D]."""
        by_token = outputs.view(*self.weights.shape, outputs.shape[-1])
        return (by_token * self.weights[..., None]).sum(1).to(self.dtype)


@dataclass(frozen=True)
class Dispatcher(ABC):
    """The way to the experts and back.

    Args:
        num_experts: E.
        axes: the axes that tokens pass.
    """

    num_experts: int
    axes: ExpertAxes

    @abstractmethod
    def dispatch(self, x: Tensor, route: Route) -> tuple[Arrived, DispatchMetadata]:
        """Send [.., D] tokens to their experts. Returns what arrived here and what the way back needs.

        The dims before the last are T in all: a route's tokens are x's in their order.
        """

    @abstractmethod
    def combine(self, outputs: Tensor, metadata: DispatchMetadata) -> Tensor:
        """Sum what the exchange brought back by its weights: [t * k, D] by choice -> [T, D]. Overflowed ones add 0."""
