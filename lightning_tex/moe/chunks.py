"""The experts' computation of rows that travel, in chunks: one is under way while another is computed.

Forward: the next chunk leaves before the experts compute one, and what they give for it goes home while they compute
the next. Backward: likewise, and a chunk's gradients go home before those of the first matrices are computed. Rows that
nothing of the block can hide (the first chunk's way there, the last one's way home) travel beside whatever runs between
its steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from lightning_tex.moe.exchange import ChunkedExchange, Exchange
from lightning_tex.moe.expert_block import ExpertBlock, Kept, Matrices, MatrixGradients, RowsAtOnce, Wanted
from lightning_tex.moe.groups import Groups
from lightning_tex.parallel.replay import outside_replay, recomputing, replayable
from lightning_tex.parallel.started import OneAhead, Together, UnderWay, started

# N rows at the experts, D model width, t own tokens, k choices per token


class BlockInChunks(ExpertBlock):
    """Rows are kept where they have come.

    Args:
        exchange: brings the chunks and takes them back.
        of_rows: the products of rows in these groups.
    """

    def __init__(self, exchange: ChunkedExchange, of_rows: Callable[[Groups], RowsAtOnce]) -> None:
        self.exchange = exchange
        self._chunks = [(chunk, of_rows(chunk.groups)) for chunk in exchange.chunks]
        self._leave: Callable[[], None] | None = None

    def depart(self, x: Tensor, weights: Tensor) -> None:
        self._x: Tensor | None = x
        chunks = zip(self.exchange.chunks, self.exchange.split(x), self.exchange.split(weights), strict=True)
        self._arriving = OneAhead([partial(_start, *chunk) for chunk in chunks])
        self._home = Homeward(self.exchange)

    def inward(self, matrices: Matrices) -> list[Kept]:
        kept, again = [], recomputing()
        for (chunk, of_rows), (rows, weights) in zip(self._chunks, self._arriving, strict=True):
            kept.append(Kept(rows, weights, *of_rows.inward(rows, matrices)))
            if not again:
                self._home.start(chunk.start_from_experts, of_rows.outward(kept[-1], matrices))
        return kept

    def outward(self, kept: list[Kept], matrices: Matrices) -> Tensor:
        def sums() -> Tensor:
            if not self._home.begun:  # a recomputation gets here only where something follows in its block
                for (chunk, of_rows), one in zip(self._chunks, kept, strict=True):
                    self._home.start(chunk.start_from_experts, of_rows.outward(one, matrices))
            return self._home.result()

        x, self._x = self._x, None
        assert x is not None
        return replayable("exchange from experts", x, sums)

    def depart_backward(self, grad: Tensor) -> None:
        parts = zip(self.exchange.chunks, self.exchange.split(grad), strict=True)
        self._gradients = OneAhead([partial(chunk.start_to_experts, part) for chunk, part in parts])

    def backward(self, kept: list[Kept], matrices: Matrices, wanted: Wanted) -> MatrixGradients:
        gradients, self._home_backward = MatrixGradients(wanted), HomewardBackward(self.exchange, wanted)
        for (chunk, of_rows), one, grad in zip(self._chunks, kept, self._gradients, strict=True):
            inner = of_rows.inner_backward(grad.contiguous(), one, matrices, gradients)
            del grad
            d_rows = of_rows.rows_backward(inner, matrices)
            leave = partial(self._home_backward.start, chunk, d_rows, inner.weights)
            del d_rows
            if len(self._chunks) > 1:
                leave()
            else:  # when what is kept and the matrices' gradients are let go of
                self._leave = leave
            del leave
            gradients.add_ups(of_rows.products, inner, one.x)
        return gradients

    def arrive_backward(self) -> tuple[Tensor | None, Tensor | None]:
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()
            del leave
        return self._home_backward.result()


class Homeward:
    """What the experts give for chunks on its way home, of which one is under way at a time, and on no tape.

    Args:
        exchange: of the chunks.
    """

    def __init__(self, exchange: ChunkedExchange) -> None:
        self._joined = exchange.joined()
        self._under_way: UnderWay[Tensor] | None = None
        self.begun = False

    def start(self, start: Callable[[Tensor], UnderWay[Tensor]], rows: Tensor) -> None:
        """The next chunk's rows set out."""
        self.begun = True
        with outside_replay():
            before, self._under_way = self._under_way, start(rows)
            self._add(before)

    def result(self) -> Tensor:
        """When all are home: [t, ..]."""
        before, self._under_way = self._under_way, None
        self._add(before)
        return self._joined.result()

    def _add(self, under_way: UnderWay[Tensor] | None) -> None:
        if under_way is not None:
            self._joined.add(under_way.wait())


class HomewardBackward:
    """Gradients of rows and of their weights on their way home, as far as they are wanted.

    Args:
        exchange: of the chunks.
        wanted: which are.
    """

    def __init__(self, exchange: ChunkedExchange, wanted: Wanted) -> None:
        self._rows = Homeward(exchange) if wanted.x else None
        self._weights = Homeward(exchange) if wanted.weights else None

    def start(self, chunk: Exchange, rows: Tensor, weights: Tensor) -> None:
        """The next chunk's set out."""
        if self._rows is not None:
            self._rows.start(chunk.start_from_experts, rows)
        if self._weights is not None:
            self._weights.start(chunk.start_choices_from_experts, weights)

    def result(self) -> tuple[Tensor | None, Tensor | None]:
        """When all are home: [t, D], [t, k]."""
        rows, weights = (None if home is None else home.result() for home in (self._rows, self._weights))
        return rows, weights


def _start(chunk: Exchange, x: Tensor, weights: Tensor) -> Together:
    return Together(
        [
            started("exchange to experts", x, lambda: chunk.start_to_experts(x)),
            started("exchange of weights", weights, lambda: chunk.start_choices_to_experts(weights)),
        ]
    )
