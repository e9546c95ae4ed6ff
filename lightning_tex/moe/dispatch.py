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
from typing import Protocol

import torch
from torch import Tensor

from lightning_tex.moe.exchange import Exchange, ExchangeInRounds, to_experts, weights_to_experts
from lightning_tex.moe.expert_axes import ExpertAxes
from lightning_tex.moe.groups import Groups
from lightning_tex.moe.router import Route

# T tokens, D model width, E experts, e experts held here, k choices per token, t own tokens, N rows at the experts


class Arrived(Protocol):
    """Rows at the experts held here, and the weight of each, grouped by expert."""

    @property
    def rows(self) -> Tensor:
        """[N, D]"""

    @property
    def weights(self) -> Tensor:
        """[N], what the expert's output of each row is multiplied with."""

    @property
    def groups(self) -> Groups:
        """Which rows are whose."""


@dataclass(frozen=True)
class ArrivedRows:
    """Rows that have come from where they were, see :class:`Arrived`."""

    rows: Tensor
    weights: Tensor
    groups: Groups


@dataclass(frozen=True)
class _RowsWhereverUsed:
    """Rows that are brought wherever they are used, so that nobody keeps them, see :class:`Arrived`.

    Args:
        tokens: [t, D].
        choice_weights: [t, k].
        exchange: brings them.
    """

    tokens: Tensor
    choice_weights: Tensor
    exchange: Exchange

    @property
    def groups(self) -> Groups:
        return self.exchange.groups

    @property
    def rows(self) -> Tensor:
        return to_experts(self.tokens, self.exchange)

    @property
    def weights(self) -> Tensor:
        return weights_to_experts(self.choice_weights, self.exchange)


class LocalRows(_RowsWhereverUsed):
    """Those that are picked from the own tokens: the exchange communicates nothing."""


@dataclass(frozen=True)
class RowsInRounds(_RowsWhereverUsed):
    """Those that come in rounds, as nobody could keep them all."""

    exchange: ExchangeInRounds


def arrive(tokens: Tensor, weights: Tensor, exchange: Exchange) -> Arrived:
    """[t, D] tokens and the [t, k] weights of their choices at the experts."""
    if isinstance(exchange, ExchangeInRounds):
        return RowsInRounds(tokens, weights, exchange)
    if exchange.communicates:
        return ArrivedRows(to_experts(tokens, exchange), weights_to_experts(weights, exchange), exchange.groups)
    return LocalRows(tokens, weights, exchange)


@dataclass(frozen=True)
class DispatchMetadata:
    """What the way back needs.

    Args:
        exchange: brings the rows back.
        dtype: of the tokens.
        overflowed: how many choices overflowed their expert's capacity, of this rank's tokens: a scalar.
        counts: [E] choices of all this rank's tokens that fell on each expert, overflowed ones included, where the
            dispatcher has counted them.
        split_tokens: tokens of each rank of the split axis, where they are gathered again.
    """

    exchange: Exchange
    dtype: torch.dtype
    overflowed: Tensor
    counts: Tensor | None = None
    split_tokens: list[int] | None = None


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

    def combine(self, outputs: Tensor, metadata: DispatchMetadata) -> Tensor:
        """What the exchange brought back, summed over each token's choices: [t, D] -> [T, D]."""
        return outputs.to(metadata.dtype)
