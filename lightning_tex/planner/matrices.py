"""Which rank owns which matrices, and what they cost it: bytes kept, bytes of a step, bytes on their way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import reduce
from math import prod
from typing import NamedTuple

import torch

from lightning_tex.optim.flat_sizes import aligned
from lightning_tex.optim.matrices.costs import MatrixCosts
from lightning_tex.optim.matrices.ownership import Loads, at_once, coordinates, rounds
from lightning_tex.optim.matrices.units import Cut
from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.sharding import ParameterSharding
from lightning_tex.parallel.topology import Axis


class _Travel(NamedTuple):
    """Elements of a round at a rank: what an exchange holds while matrices go to their owners, and back.

    Args:
        over_replicas, over_cuts: whether they go over these axes.
        run: of the rank's part of the buffer.
        parts: of the stored parts of matrices whose owner is at this replica.
        arriving: of the rank's own matrices, padded.
    """

    over_replicas: bool
    over_cuts: bool
    run: int
    parts: int
    arriving: int

    def there(self, from_replicas: bool = True) -> int:
        """The most at once: what is sent, what arrives, and what is put together of that."""
        replicas = self.over_replicas and from_replicas
        first = self.parts + max(self.run, self.parts) if replicas else 0
        then = (self.parts if replicas else 0) + self.arriving + max(self.parts, self.arriving)
        return max(first, then if self.over_cuts else 0)

    def back(self) -> int:
        """The most at once: cut into parts, sent, arrived; then sent and arrived over the replicas."""
        cut = 2 * self.arriving + self.parts if self.over_cuts else 0
        held = self.parts if self.over_cuts else 0
        return max(cut, held + self.parts + self.run if self.over_replicas else 0)


class Owned(NamedTuple):
    """What an owner has of its matrices.

    Args:
        master, moments, scalars: bytes of fp32 masters, of states that are tensors, of those that are one number.
        flops: of the products of a step.
    """

    master: int
    moments: int
    scalars: int
    flops: int

    @property
    def bytes(self) -> int:
        return self.master + self.moments + self.scalars

    def plus(self, other: Owned) -> Owned:
        """Both."""
        return Owned(
            self.master + other.master,
            self.moments + other.moments,
            self.scalars + other.scalars,
            self.flops + other.flops,
        )


NOTHING = Owned(0, 0, 0, 0)


class _Unit(NamedTuple):
    """One matrix of a buffer.

    Args:
        cut: its shapes.
        start: where its stored part begins in the buffer.
        owner: its owner's rank on each of the buffer's axes.
    """

    cut: Cut
    start: int
    owner: tuple[int, ...]

    @property
    def stored(self) -> int:
        return prod(self.cut.stored)

    @property
    def numel(self) -> int:
        return prod(self.cut.shape)

    def run(self, replica: int, part: int) -> int:
        """Elements of the stored part that a replica has in its part of the buffer."""
        stop = self.start + self.stored
        return max(0, min(stop, (replica + 1) * part) - max(self.start, replica * part))


class MatrixBuffer(NamedTuple):
    """The matrices of one flat buffer.

    Args:
        axes: the ranks that share them: replicas that own parts, and axes that matrices are cut over.
        part: elements of a replica's part of the buffer.
        dtype: of the parameters.
        units: the matrices.
        costs: of the optimizer.
    """

    axes: tuple[Axis, ...]
    part: int
    dtype: torch.dtype
    units: tuple[_Unit, ...]
    costs: MatrixCosts

    @classmethod
    def of(
        cls,
        shardings: Sequence[ParameterSharding],
        owners: Axis,
        part: int,
        dtype: torch.dtype,
        loads: Loads,
        costs: MatrixCosts,
    ) -> MatrixBuffer:
        """Those of a buffer of such parameters."""
        placed: list[tuple[Cut, int]] = []
        start = 0
        for sharding in shardings:
            cut = Cut.of(sharding)
            placed += [(cut, start + own) for own in cut.starts]
            start += aligned(prod(sharding.box.stored))
        axes = (owners, *(axis for axis, _ in placed[0][0].axes))
        assigned = loads.assign([prod(cut.shape) for cut, _ in placed], axes)
        units = tuple(
            _Unit(cut, start, coordinates(owner, [axis.size for axis in axes]))
            for (cut, start), owner in zip(placed, assigned, strict=True)
        )
        return cls(axes, part, dtype, units, costs)

    def working(self, masters: bool) -> torch.dtype:
        """The dtype that matrices are updated in."""
        return torch.float32 if masters and self.dtype.itemsize == 2 else self.dtype

    def kept(self, masters: bool) -> dict[tuple[int, ...], Owned]:
        """By owner, its rank on each of the axes."""
        dtype = self.working(masters)
        found: dict[tuple[int, ...], Owned] = {}
        for unit in self.units:
            costs = self.costs.of(unit.cut.shape, dtype)
            master = 4 * unit.numel if dtype != self.dtype else 0
            found[unit.owner] = found.get(unit.owner, NOTHING).plus(
                Owned(master, costs.states, costs.numbers, costs.flops)
            )
        return found

    def rounds(self, device: str) -> Iterator[list[_Unit]]:
        """Matrices that travel together."""
        sizes = [axis.size for axis in self.axes]
        owners = [_number(unit.owner, sizes) for unit in self.units]
        for places in rounds([unit.numel for unit in self.units], owners, at_once(device)):
            yield [self.units[place] for place in places]

    def temporaries(self, masters: bool, gradient_bytes: int, device: str) -> int:
        """The most bytes that a step takes for a while: of the owner of the most that travels at once."""
        return max(self._of_round(some, _fullest(some), masters, gradient_bytes) for some in self.rounds(device))

    def _of_round(self, some: Sequence[_Unit], here: tuple[int, ...], masters: bool, gradient_bytes: int) -> int:
        dtype, own = self.working(masters), self.dtype.itemsize
        mine = [unit for unit in some if unit.owner == here]
        travel = _Travel(
            self.axes[0].size > 1,
            len(self.axes) > 1,
            sum(unit.run(here[0], self.part) for unit in some),
            sum(unit.stored for unit in some if unit.owner[0] == here[0]),
            sum(unit.stored for unit in mine) * prod(axis.size for axis in self.axes[1:]),
        )
        whole = sum(unit.numel for unit in mine)
        plain = dtype == self.dtype
        values = own * travel.arriving if travel.over_cuts and plain else 0
        gradients = gradient_bytes * travel.arriving if travel.over_cuts or travel.over_replicas else 0
        upcast = dtype.itemsize * whole if gradient_bytes != dtype.itemsize else 0
        costs = [self.costs.of(unit.cut.shape, dtype) for unit in mine]
        temporaries = sum(one.further for one in costs)
        temporaries += max((one.temporaries - one.further for one in costs), default=0)
        return max(
            own * travel.there(from_replicas=False) if plain else 0,
            values + gradient_bytes * travel.there(),
            values + gradients + upcast + temporaries,
            values + own * (travel.back() + (0 if plain else whole)),
        )

    def sent_elements(self) -> Iterator[tuple[Axis, Fraction]]:
        """Elements that a rank sends over each axis, on the mean of all ranks, each time that all matrices travel."""
        replicas, *cuts = self.axes
        of_replicas = sum(unit.stored - unit.run(unit.owner[0], self.part) for unit in self.units)
        yield replicas, Fraction(of_replicas, replicas.size)
        ranks = Fraction(1, replicas.size)
        for place, axis in enumerate(cuts):
            ranks /= axis.size
            # What is whole over the axes before travels as that, between the ranks that own it there.
            stored = sum(unit.stored for unit in self.units) * prod(other.size for other in cuts[:place])
            yield axis, (axis.size - 1) * stored * ranks


@dataclass(frozen=True, eq=False)
class OwnedMatrices:
    """The matrices of all buffers of a layout. Compared by identity.

    Args:
        layout: sizes of the axes.
        buffers: in the optimizer's order.
    """

    layout: Layout
    buffers: tuple[MatrixBuffer, ...]
    _known: dict[bool, Owned] = field(default_factory=dict)

    def kept(self, masters: bool) -> Owned:
        """Of the rank that keeps the most."""
        if masters not in self._known:
            self._known[masters] = self._fullest(masters) if self.buffers else NOTHING
        return self._known[masters]

    def _fullest(self, masters: bool) -> Owned:
        by_axes: dict[tuple[Axis, ...], dict[tuple[int, ...], Owned]] = {}
        for buffer in self.buffers:
            found = by_axes.setdefault(buffer.axes, {})
            for owner, owned in buffer.kept(masters).items():
                found[owner] = found.get(owner, NOTHING).plus(owned)

        def of(rank: int) -> Owned:
            here = self.layout.coordinates(rank)
            owners = [tuple(here[axis.name] if axis.size > 1 else 0 for axis in axes) for axes in by_axes]
            each = (found.get(owner, NOTHING) for owner, found in zip(owners, by_axes.values(), strict=True))
            return reduce(Owned.plus, each)

        return max(map(of, range(self.layout.world)), key=lambda owned: owned.bytes)

    def temporaries(self, masters: bool, zero_stage: int, device: str) -> int:
        """The most bytes that a step takes for a while."""
        return max((b.temporaries(masters, _gradient_bytes(b, zero_stage), device) for b in self.buffers), default=0)

    def sent(self, masters: bool, zero_stage: int, device: str) -> Iterator[tuple[Axis, int, Fraction]]:
        """The all-to-alls of a step: over which axis, how many, and the bytes that a rank sends in all of them, on the
        mean of all ranks."""
        for buffer in self.buffers:
            times = len(list(buffer.rounds(device)))
            own, replicas = buffer.dtype.itemsize, buffer.axes[0]
            there_and_back = [_gradient_bytes(buffer, zero_stage), own]
            values = [own] if buffer.working(masters) == buffer.dtype else []
            for axis, elements in buffer.sent_elements():
                each = there_and_back if axis is replicas else there_and_back + values
                if axis.size > 1:
                    yield axis, times * len(each), sum(each) * elements


def _gradient_bytes(buffer: MatrixBuffer, zero_stage: int) -> int:
    return max(4, buffer.dtype.itemsize) if zero_stage == 2 else buffer.dtype.itemsize


def _fullest(some: Sequence[_Unit]) -> tuple[int, ...]:
    elements: dict[tuple[int, ...], int] = {}
    for unit in some:
        elements[unit.owner] = elements.get(unit.owner, 0) + unit.numel
    return max(elements, key=lambda owner: elements[owner])


def _number(owner: Sequence[int], sizes: Sequence[int]) -> int:
    number = 0
    for rank, size in zip(owner, sizes, strict=True):
        number = number * size + rank
    return number
