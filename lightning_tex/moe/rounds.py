"""Dropless routing with a bound on the rows at a rank's experts at once: what is beyond is served in further rounds.

A batch whose choices fall on few experts then takes time and not memory. Nothing of a round is kept: the backward sends
its rows again. All ranks of an expert group take part in all rounds, of which there are as many as the fullest rank
needs: one, where no rank is beyond the bound, and then all is as without one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from lightning_tex.moe.dropless import DroplessDispatcher
from lightning_tex.moe.exchange import DroplessExchange, ExchangeInRounds
from lightning_tex.moe.expert_axes import ExpertAxes
from lightning_tex.moe.expert_block import ExpertBlock, Gradients, Kept, Matrices
from lightning_tex.moe.groups import Groups
from lightning_tex.moe.permute import Order
from lightning_tex.parallel.collectives import all_gather
from lightning_tex.parallel.replay import replayable

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

    def _travelling(self, indices: Tensor, order: Order, counts: Tensor) -> DroplessExchange:
        axes = self.axes
        of_group = all_gather(counts[None], 0, axes.expert, operation="exchange_counts")  # [P, E]
        of_all = all_gather(of_group[None], 0, axes.gather, operation="exchange_counts")  # [gather, P, E]
        known = of_all.cpu()  # the one thing that the host waits for
        rounds = _rounds(known, axes.expert.size, self.round_factor)
        parts = [_part(axes, indices.shape, order, of_all, known, i, rounds) for i in range(rounds)]
        if rounds == 1:
            return parts[0]
        whole = _part(axes, indices.shape, order, of_all, known, 0, 1)
        return ExchangeInRounds(**vars(whole), rounds=parts)


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
    begin, end = (counts[axes.gather.rank, axes.expert.rank] * i // parts for i in (part, part + 1))
    counts, known = (c * (part + 1) // parts - c * part // parts for c in (counts, known))
    sent = known[axes.gather.rank, axes.expert.rank].view(-1, here).sum(1).tolist()
    total, lengths = sum(sent), end - begin
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
    """One round after the other, from tokens [t, D] and the weights of their choices [t, k]; nothing else is kept.

    Args:
        rounds: bring the rows and take them back.
        block: what computes rows that lie in these groups.
    """

    def __init__(self, rounds: list[DroplessExchange], block: Callable[[Groups], ExpertBlock]) -> None:
        self.rounds = [(exchange, block(exchange.groups)) for exchange in rounds]

    def inward(self, x: Tensor, matrices: Matrices) -> tuple[Tensor, Tensor | None]:
        return x.new_empty(0), None

    def outward(self, kept: Kept, matrices: Matrices) -> Tensor:
        def run() -> Tensor:
            total = _zeros(kept.x)
            for exchange, block in self.rounds:
                total += exchange.from_experts(block.outward(self._arrived(kept, exchange, block, matrices), matrices))
            return total.to(kept.x.dtype)

        return replayable("experts in rounds", kept.x, run)

    def backward(self, grad: Tensor, kept: Kept, matrices: Matrices, wanted: Matrices) -> Gradients:
        d_x, d_weights = _zeros(kept.x), torch.zeros_like(kept.weights)
        d_matrices: list[Tensor | None] = [None] * len(matrices)
        for exchange, block in self.rounds:
            arrived = self._arrived(kept, exchange, block, matrices)
            found = block.backward(exchange.to_experts(grad), arrived, matrices, wanted)
            d_x += exchange.from_experts(found.x)
            d_weights += exchange.choices_from_experts(found.weights)
            for i, d_matrix in enumerate(found[2:]):
                total = d_matrices[i]
                d_matrices[i] = d_matrix if total is None or d_matrix is None else total.add_(d_matrix)
        return Gradients(d_x.to(kept.x.dtype), d_weights, *d_matrices)

    def _arrived(self, kept: Kept, exchange: DroplessExchange, block: ExpertBlock, matrices: Matrices) -> Kept:
        rows, weights = exchange.to_experts(kept.x), exchange.choices_to_experts(kept.weights)
        return Kept(rows, weights, *block.inward(rows, matrices))


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
