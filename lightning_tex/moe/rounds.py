"""Dropless routing with a bound on the rows at a rank's experts at once: what is beyond is served in further rounds.

A batch whose choices fall on few experts then takes time and not memory. Nothing of a round is kept: the backward sends
its rows again. All ranks of an expert group take part in all rounds, of which there are as many as the fullest rank
needs: one, where no rank is beyond the bound, and then all is as without one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil

import torch
from torch import Tensor

from lightning_tex.moe.chunks import Homeward, HomewardBackward
from lightning_tex.moe.dropless import DroplessDispatcher
from lightning_tex.moe.exchange import ChunkedExchange, DroplessExchange, Exchange
from lightning_tex.moe.expert_axes import ExpertAxes
from lightning_tex.moe.expert_block import ExpertBlock, Kept, Matrices, MatrixGradients, RowsAtOnce, Wanted
from lightning_tex.moe.groups import Groups
from lightning_tex.moe.permute import Order, group_by_expert
from lightning_tex.parallel.collectives import all_gather
from lightning_tex.parallel.replay import replayable
from lightning_tex.parallel.started import OneAhead, Together

# t own tokens, D model width, E experts, e experts held here, P = E/e ranks on the expert axis, k choices per token,
# N rows at the experts


@dataclass(frozen=True)
class BoundedDroplessDispatcher(DroplessDispatcher):
    """Every choice is served, in as many rounds as it takes.

    Args:
        round_factor: rows at a rank's experts at once, relative to their mean over ranks, but for rounding: every
            sender's rows for an expert are dealt out over the rounds.
    """

    round_factor: float

    def _travelling(self, indices: Tensor) -> tuple[ChunkedExchange, Tensor]:
        axes = self.axes
        order = group_by_expert(indices.flatten(), self.num_experts)
        counts = order.starts.diff()
        of_group = all_gather(counts[None], 0, axes.expert, operation="exchange_counts")  # [P, E]
        of_all = all_gather(of_group[None], 0, axes.gather, operation="exchange_counts")  # [gather, P, E]
        known = of_all.cpu()  # the one thing that the host waits for
        rounds = _rounds(known, axes.expert.size, self.round_factor)
        parts = rounds * axes.chunks
        exchanges = [_part(axes, indices.shape, order, of_all, known, i, parts) for i in range(parts)]
        return ChunkedExchange(exchanges, beside=axes.chunks > 1, kept=rounds == 1), counts


def _rounds(counts: Tensor, ranks: int, factor: float) -> int:
    """As many as the fullest rank needs.

    Args:
        counts: [gather, P, E] choices of every rank for every expert.
        ranks: P.
    """
    rows = counts.sum((0, 1)).view(ranks, -1).sum(1)  # [P]
    bound = max(1, ceil(factor * rows.sum().item() / ranks))
    return max(1, ceil(rows.max().item() / bound))


def _part(
    axes: ExpertAxes, shape: torch.Size, order: Order, counts: Tensor, known: Tensor, part: int, parts: int
) -> DroplessExchange:
    """The exchange of one of equal parts of every sender's choices of every expert.

    Args:
        shape: [t, k] of the own choices.
        counts, known: [gather, P, E] choices of every rank for every expert, on the device and on the host.
    """
    device, here = counts.device, known.shape[-1] // axes.expert.size
    own = slice(axes.expert.rank * here, (axes.expert.rank + 1) * here)
    all_own = counts[axes.gather.rank, axes.expert.rank]
    begin = all_own // parts * part + (all_own % parts).clamp(max=part)
    counts, known = (c // parts + (c % parts > part) for c in (counts, known))
    sent = known[axes.gather.rank, axes.expert.rank].view(-1, here).sum(1).tolist()
    total, lengths = sum(sent), counts[axes.gather.rank, axes.expert.rank]
    shift = order.starts[:-1] + begin - (lengths.cumsum(0) - lengths)
    numbers = torch.arange(total, device=device)
    choice = order.sorted[numbers + shift.repeat_interleave(lengths, output_size=total)]
    slot = torch.full((shape.numel(),), total, device=device).scatter_(0, choice, numbers).view(shape)
    arriving = known[..., own]
    return DroplessExchange.of(
        axes, choice, slot, sent, arriving[axes.gather.rank].sum(1).tolist(), arriving.sum((1, 2)).tolist(),
        arriving.sum((0, 1)).tolist(), counts[..., own].flatten(0, 1),
    )  # fmt: skip


class BlockInRounds(ExpertBlock):
    """One round after the other; nothing is kept but tokens and weights. Rows and gradients of a round come together.

    Args:
        exchange: brings the rounds and takes them back.
        of_rows: the products of rows in these groups.
    """

    def __init__(self, exchange: ChunkedExchange, of_rows: Callable[[Groups], RowsAtOnce]) -> None:
        self.exchange = exchange
        self._rounds = [(each, of_rows(each.groups)) for each in exchange.chunks]
        self._given: tuple[Tensor, ...] = ()

    def depart(self, x: Tensor, weights: Tensor) -> None:
        self._given = x, weights

    def inward(self, matrices: Matrices) -> list[Kept]:
        (x, weights), self._given = self._given, ()
        return [Kept(x, weights, x.new_empty(0), None)]

    def outward(self, kept: list[Kept], matrices: Matrices) -> Tensor:
        def run() -> Tensor:
            home = Homeward(self.exchange)
            for (each, of_rows), (rows, weights) in zip(self._rounds, self._arriving(kept[0]), strict=True):
                home.start(each.start_from_experts, self._computed(of_rows, rows, weights, matrices))
                del rows, weights
            return home.result()

        return replayable("experts in rounds", kept[0].x, run)

    def _computed(self, of_rows: RowsAtOnce, rows: Tensor, weights: Tensor, matrices: Matrices) -> Tensor:
        return of_rows.outward(Kept(rows, weights, *of_rows.inward(rows, matrices)), matrices)

    def depart_backward(self, grad: Tensor) -> None:
        self._given = (grad,)

    def backward(self, kept: list[Kept], matrices: Matrices, wanted: Wanted) -> MatrixGradients:
        (grad,), self._given = self._given, ()
        gradients, self._home = MatrixGradients(wanted), HomewardBackward(self.exchange, wanted)
        arriving = self._arriving(kept[0], grad)
        for (each, of_rows), (rows, weights, d_outputs) in zip(self._rounds, arriving, strict=True):
            again = Kept(rows, weights, *of_rows.inward(rows, matrices))
            inner = of_rows.inner_backward(d_outputs, again, matrices, gradients)
            del rows, weights, d_outputs
            self._home.start(each, of_rows.rows_backward(inner, matrices), inner.weights)
            gradients.add_ups(of_rows.products, inner, again.x)
        return gradients

    def arrive_backward(self) -> tuple[Tensor | None, Tensor | None]:
        return self._home.result()

    def _arriving(self, kept: Kept, *grad: Tensor) -> OneAhead[tuple[Tensor, ...]]:
        """Of every round rows, their weights and, with it, gradients of what the experts gave for them."""

        def start(each: Exchange) -> Together:
            travelling = [each.start_to_experts(kept.x), each.start_choices_to_experts(kept.weights)]
            return Together([*travelling, *map(each.start_to_experts, grad)])

        return OneAhead([partial(start, each) for each in self.exchange.chunks], self.exchange.beside)
