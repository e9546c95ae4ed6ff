"""What is stepped as a whole: a parameter or, of a stack of experts, the matrix of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from lightning_tex.optim.flat import Entry
from lightning_tex.parallel.extent import Extent
from lightning_tex.parallel.sharding import ParameterSharding
from lightning_tex.parallel.topology import Axis


@dataclass(frozen=True, eq=False)
class Unit:
    """A matrix (or vector, ..) that is updated as a whole, by one of the ranks that have parts of it.

    Args:
        entry: the parameter.
        expert: its place in a stack of experts; ``None``: it is the whole parameter.
        start: where its stored part begins in the buffer.
        stored: shape of the part that every rank stores.
        shape: of the whole.
        cuts: the axes that it is cut over, with the dim.
    """

    entry: Entry
    expert: int | None
    start: int
    stored: tuple[int, ...]
    shape: tuple[int, ...]
    cuts: tuple[tuple[Axis, int], ...]

    @property
    def stop(self) -> int:
        """Where its stored part ends in the buffer."""
        return self.start + prod(self.stored)

    @property
    def numel(self) -> int:
        """Elements of the whole."""
        return prod(self.shape)

    @property
    def sharding(self) -> ParameterSharding:
        """Of the parameter."""
        return self.entry.sharding

    @property
    def run(self) -> slice:
        """The stored part in the buffer."""
        return slice(self.start, self.stop)

    def stacked(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a state of the whole parameter, from its shape for this unit."""
        return shape if self.expert is None else (self.sharding.box.full[0], *shape)

    def of_one(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a state for this unit, from that of the whole parameter."""
        return shape if self.expert is None else shape[1:]

    def within_parameter(self, shape: tuple[int, ...]) -> Extent:
        """Where a state of such a shape lies in that of the whole parameter."""
        inner = Extent.whole(shape)
        return inner if self.expert is None else Extent((self.expert, *inner.offsets), (1, *inner.sizes))


class Cut(NamedTuple):
    """How a parameter falls into units, all of one shape.

    Args:
        experts: how many there are here, one for each expert; ``None``: the parameter is one.
        stored: shape of the part that every rank stores of one.
        shape: of the whole.
        axes: those of several ranks that each is cut over, with the dim.
    """

    experts: int | None
    stored: tuple[int, ...]
    shape: tuple[int, ...]
    axes: tuple[tuple[Axis, int], ...]

    @classmethod
    def of(cls, sharding: ParameterSharding) -> Cut:
        """Of a parameter: a stack of experts, one matrix after the other in the first dim, or a whole."""
        box, dims = sharding.box, sharding.shard_dims
        if not any(axis.name == "expert" and dim == 0 for axis, dim in dims):
            return cls(None, box.stored, box.full, tuple((axis, dim) for axis, dim in dims if axis.size > 1))
        inner = tuple((axis, dim - 1) for axis, dim in dims if axis.size > 1 and dim > 0)
        return cls(box.extent.sizes[0], box.stored[1:], box.full[1:], inner)

    @property
    def starts(self) -> list[int]:
        """Where the stored part of each begins in that of the parameter."""
        return [place * prod(self.stored) for place in range(1 if self.experts is None else self.experts)]


def units(entry: Entry) -> Iterator[Unit]:
    """What of a parameter is stepped as a whole, as far as this rank has parts of it."""
    cut, first = Cut.of(entry.sharding), entry.sharding.box.extent.offsets[:1]
    for place, start in enumerate(cut.starts):
        expert = None if cut.experts is None else first[0] + place
        yield Unit(entry, expert, entry.start + start, cut.stored, cut.shape, cut.axes)
