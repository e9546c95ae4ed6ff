"""The way of matrices between the ranks that have parts of them and those that own them, axis by axis.

Of a flat buffer every replica has some consecutive elements (``FlatBuffer.own``), which are of the part of a matrix
that its tensor rank stores. To the owner they go over the replicas first, where they make up that part, then over the
axes that the matrix is cut over. Updated matrices go the same way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_tex.optim.flat import FlatBuffer
from lightning_tex.optim.matrices.ownership import coordinates
from lightning_tex.optim.matrices.units import Unit
from lightning_tex.parallel.all_to_all import all_to_all
from lightning_tex.parallel.topology import Axis

# D replicas that own parts of the buffer, n elements of each part


class MatrixExchange:
    """Moves the matrices of one buffer. Every call is collective over the axes.

    Args:
        buffer: the parameters.
        axes: ranks that share the matrices: the replicas that own parts, and the axes that matrices are cut over.
        owners: unit -> owner, a number over all ``axes``.
    """

    def __init__(self, buffer: FlatBuffer, axes: Sequence[Axis], owners: dict[Unit, int]) -> None:
        self.buffer = buffer
        self.replicas, *self.cut_axes = axes
        sizes = [axis.size for axis in axes]
        self._ranks = {unit: coordinates(owner, sizes) for unit, owner in owners.items()}

    def are_mine(self, units: Sequence[Unit]) -> list[Unit]:
        """Those that this rank owns."""
        here = (self.replicas.rank, *(axis.rank for axis in self.cut_axes))
        return [unit for unit in units if self._ranks[unit] == here]

    def collect(self, own: Tensor, units: Sequence[Unit]) -> list[Tensor]:
        """Whole matrices from the ranks' parts of a buffer: of the units that are owned here, in their order.

        Args:
            own: this rank's part of a tensor that is laid out as the buffer. [n]
            units: which; the same ones on all ranks.
        """
        return self._joined(self._parts_over_replicas(own, units), self._at_this_replica(units), own)

    def collect_replicated(self, flat: Tensor, units: Sequence[Unit]) -> list[Tensor]:
        """:meth:`collect` from a tensor that every replica has as a whole. [D n]"""
        here = self._at_this_replica(units)
        return self._joined([flat[unit.run] for unit in here], here, flat)

    def give_back(self, matrices: Sequence[Tensor], own: Tensor, units: Sequence[Unit]) -> None:
        """Write matrices, which :meth:`collect` gave or others of their shapes, into the ranks' parts of a buffer."""
        here = self._at_this_replica(units)
        parts = self._parted([matrix.to(own.dtype) for matrix in matrices], here, own)
        if self.replicas.size == 1:
            for unit, part in zip(here, parts, strict=True):
                own[unit.run].copy_(part)
            return
        outgoing = [
            [part[self._run(unit, rank)] for unit, part in zip(here, parts, strict=True)]
            for rank in range(self.replicas.size)
        ]
        incoming = self._of_replicas(units)
        lengths = [[_length(self._run(unit, self.replicas.rank)) for unit in theirs] for theirs in incoming]
        start = self.buffer.own_start
        for theirs, arrived in zip(incoming, _swapped(outgoing, lengths, self.replicas, own), strict=True):
            for unit, values in zip(theirs, arrived, strict=True):
                run = self._run(unit, self.replicas.rank)
                own[unit.start + run.start - start : unit.start + run.stop - start].copy_(values)

    # --- over the replicas

    def _of_replicas(self, units: Sequence[Unit]) -> list[list[Unit]]:
        """The units that each replica owns."""
        found: list[list[Unit]] = [[] for _ in range(self.replicas.size)]
        for unit in units:
            found[self._ranks[unit][0]].append(unit)
        return found

    def _at_this_replica(self, units: Sequence[Unit]) -> list[Unit]:
        return [unit for unit in units if self._ranks[unit][0] == self.replicas.rank]

    def _run(self, unit: Unit, rank: int) -> slice:
        """The elements of a unit's stored part that a replica has in its part of the buffer."""
        length = len(self.buffer.own)
        first, last = (min(max(at, unit.start), unit.stop) for at in (rank * length, (rank + 1) * length))
        return slice(first - unit.start, last - unit.start)

    def _parts_over_replicas(self, own: Tensor, units: Sequence[Unit]) -> list[Tensor]:
        """The stored parts of the units whose owner is at this replica. [numel] each"""
        here = self._at_this_replica(units)
        if self.replicas.size == 1:
            return [own[unit.run] for unit in here]
        start = self.buffer.own_start

        def held(unit: Unit) -> Tensor:
            run = self._run(unit, self.replicas.rank)
            return own[unit.start + run.start - start : unit.start + run.stop - start]

        outgoing = [[held(unit) for unit in theirs] for theirs in self._of_replicas(units)]
        lengths = [[_length(self._run(unit, rank)) for unit in here] for rank in range(self.replicas.size)]
        arrived = _swapped(outgoing, lengths, self.replicas, own)
        return [torch.cat(runs) for runs in zip(*arrived, strict=True)]

    # --- over the axes that matrices are cut over

    def _joined(self, parts: list[Tensor], units: list[Unit], like: Tensor) -> list[Tensor]:
        parts = [part.view(unit.stored) for part, unit in zip(parts, units, strict=True)]
        for place, axis in enumerate(self.cut_axes):
            by_rank = self._by_rank(units, place, axis)
            outgoing = [[parts[i].reshape(-1) for i in theirs] for theirs in by_rank]
            mine = by_rank[axis.rank]
            shapes = [parts[i].shape for i in mine]
            arrived = _swapped(outgoing, [[prod(shape) for shape in shapes]] * axis.size, axis, like)
            units = [units[i] for i in mine]
            parts = [
                torch.cat([run.view(shape) for run in runs], unit.cuts[place][1]).narrow(
                    unit.cuts[place][1], 0, unit.shape[unit.cuts[place][1]]
                )
                for unit, shape, runs in zip(units, shapes, zip(*arrived, strict=True), strict=True)
            ]
        return parts

    def _parted(self, matrices: Sequence[Tensor], units: list[Unit], like: Tensor) -> list[Tensor]:
        """The reverse of :meth:`_joined`: stored parts, flat, of all units whose owner is at this replica."""
        at_each = [units]
        for place, axis in enumerate(self.cut_axes):
            at_each.append([at_each[-1][i] for i in self._by_rank(at_each[-1], place, axis)[axis.rank]])
        parts = list(matrices)
        for place, axis in reversed(list(enumerate(self.cut_axes))):
            before, mine = at_each[place], at_each[place + 1]
            cut = [_padded_parts(m, *_cut(unit, place)) for m, unit in zip(parts, mine, strict=True)]
            outgoing = [[pieces[rank].reshape(-1) for pieces in cut] for rank in range(axis.size)]
            by_rank = self._by_rank(before, place, axis)
            shapes = [_stored_at(unit, place) for unit in before]
            lengths = [[prod(shapes[i]) for i in theirs] for theirs in by_rank]
            arrived = _swapped(outgoing, lengths, axis, like)
            back: dict[int, Tensor] = {}
            for theirs, values in zip(by_rank, arrived, strict=True):
                back.update(zip(theirs, values, strict=True))
            parts = [back[i].view(shapes[i]) for i in range(len(before))]
        return [part.reshape(-1) for part in parts]

    def _by_rank(self, units: Sequence[Unit], place: int, axis: Axis) -> list[list[int]]:
        """Places of the units that each rank of an axis owns."""
        found: list[list[int]] = [[] for _ in range(axis.size)]
        for i, unit in enumerate(units):
            found[self._ranks[unit][place + 1]].append(i)
        return found


def _length(run: slice) -> int:
    return int(run.stop - run.start)


def _cut(unit: Unit, place: int) -> tuple[int, int, int]:
    """The dim that a unit is cut in over its axis ``place``, the ranks there, and what each stores of it."""
    axis, dim = unit.cuts[place]
    return dim, axis.size, unit.stored[dim]


def _stored_at(unit: Unit, place: int) -> tuple[int, ...]:
    """Shape of a unit's part once it is whole over its first ``place`` axes."""
    shape = list(unit.stored)
    for _, dim in unit.cuts[:place]:
        shape[dim] = unit.shape[dim]
    return tuple(shape)


def _padded_parts(matrix: Tensor, dim: int, ranks: int, length: int) -> Sequence[Tensor]:
    missing = ranks * length - matrix.shape[dim]
    if missing:
        padding = [0, 0] * (matrix.dim() - 1 - dim) + [0, missing]
        matrix = F.pad(matrix, padding)
    return matrix.split(length, dim)


def _swapped(
    outgoing: Sequence[Sequence[Tensor]], lengths: Sequence[Sequence[int]], axis: Axis, like: Tensor
) -> list[Sequence[Tensor]]:
    """What the ranks of an axis send one another: runs for each rank in, runs of each rank out. [n] each

    Args:
        outgoing: for every rank.
        lengths: of the runs that come from every rank.
        like: of the dtype, on the device.
    """
    runs = [run for theirs in outgoing for run in theirs]
    sent = torch.cat(runs) if runs else like.new_empty(0)
    counts = [sum(map(len, theirs)) for theirs in outgoing]
    arrived = all_to_all(sent, axis, [sum(theirs) for theirs in lengths], counts)
    from_each = arrived.split([sum(theirs) for theirs in lengths])
    return [values.split(list(theirs)) for values, theirs in zip(from_each, lengths, strict=True)]
