"""The seam of dispatch: tokens to their experts, and what comes back put together (paper sections 3 and 5.1).

    route = router(tokens)
    arrived, metadata = dispatcher.dispatch(tokens, route)
    y = dispatcher.combine(experts(arrived), metadata)

A further way to dispatch is a further :class:`Dispatcher`, which a subclass of the layer chooses in
:meth:`~lightning_tex.moe.MoE.make_dispatcher`. ``capacity`` decides which choices overflow their expert,
``dropless`` serves all, ``sequence_parallel`` has a capacity for tokens that are split already. The axes that they
pass, and duplicate-token dropping, are the table of ``expert_axes``; ``exchange`` moves the rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_tex.moe.exchange import ChunkedExchange, Exchange, LocalExchange
from lightning_tex.moe.expert_axes import ExpertAxes
from lightning_tex.moe.groups import Groups
from lightning_tex.moe.router import Route

# T tokens, D model width, E experts, e experts held here, k choices per token, t own tokens, N rows at the experts


class ArrivedRows(NamedTuple):
    """Rows at the experts held here [N, D] and the weight of each [N], grouped by expert."""

    rows: Tensor
    weights: Tensor
    groups: Groups


@dataclass(frozen=True)
class Arrived:
    """What comes to the experts, and how: the experts' computation brings it, beside its products where it can.

    Args:
        tokens: [t, D].
        weights: [t, k], what the experts' outputs of a token's choices are multiplied with.
        exchange: brings a row of each choice, and what the experts give for it back.
    """

    tokens: Tensor
    weights: Tensor
    exchange: LocalExchange | ChunkedExchange

    @classmethod
    def by(cls, exchange: Exchange | ChunkedExchange, tokens: Tensor, weights: Tensor) -> Arrived:
        """By one exchange or in chunks; rows that only have to be picked are not kept."""
        if isinstance(exchange, ChunkedExchange) or (isinstance(exchange, LocalExchange) and not exchange.communicates):
            return cls(tokens, weights, exchange)
        return cls(tokens, weights, ChunkedExchange([exchange]))

    @property
    def here(self) -> int:
        """Rows that come to the experts held here."""
        return self.exchange.rows

    def by_chunk(self) -> Iterator[ArrivedRows]:
        """What comes of each chunk, without gradient. Collective: what has come already comes again."""
        exchange = self.exchange
        chunked = exchange if isinstance(exchange, ChunkedExchange) else ChunkedExchange([exchange])
        parts = chunked.split(self.tokens.detach()), chunked.split(self.weights.detach())
        for chunk, tokens, weights in zip(chunked.chunks, *parts, strict=True):
            rows = chunk.start_to_experts(tokens).wait()
            yield ArrivedRows(rows, chunk.start_choices_to_experts(weights).wait(), chunk.groups)


@dataclass(frozen=True)
class DispatchMetadata:
    """What the way back needs.

    Args:
        dtype: of the tokens.
        overflowed: how many choices overflowed their expert's capacity, of this rank's tokens: a scalar.
        counts: [E] choices of all this rank's tokens that fell on each expert, overflowed ones included, where the
            dispatcher has counted them.
        split_tokens: tokens of each rank of the split axis, where they are gathered again.
    """

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
