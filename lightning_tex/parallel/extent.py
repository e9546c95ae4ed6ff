"""Some elements of a tensor: a rectangle of global indices, the one type for every part of a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Extent:
    """A rectangle of a tensor. Of a flat tensor it is a run of elements.

    Args:
        offsets: index of the first element, per dim.
        sizes: length, per dim; an extent with a 0 in it is empty.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Extent:
        """All of a tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @classmethod
    def run(cls, start: int, stop: int) -> Extent:
        """Elements ``[start, stop)`` of a flat tensor; empty where ``stop <= start``."""
        return cls((start,), (max(0, stop - start),))

    @property
    def numel(self) -> int:
        """How many elements."""
        return prod(self.sizes)

    @property
    def stops(self) -> tuple[int, ...]:
        """Index behind the last element, per dim."""
        return tuple(offset + size for offset, size in zip(self.offsets, self.sizes, strict=True))

    @property
    def strides(self) -> tuple[int, ...]:
        """Distance of neighbours in each dim, where the elements lie in row-major order."""
        return tuple(prod(self.sizes[dim + 1 :]) for dim in range(len(self.sizes)))

    @property
    def slices(self) -> tuple[slice, ...]:
        """What indexes these elements in the tensor."""
        return tuple(map(slice, self.offsets, self.stops))

    def shift(self, by: Sequence[int]) -> Extent:
        """The same rectangle, ``by`` further in each dim: from a part's own indices to the whole's."""
        return Extent(tuple(offset + step for offset, step in zip(self.offsets, by, strict=True)), self.sizes)

    def within(self, outer: Extent) -> Extent:
        """The same elements, counted from the first one of ``outer``."""
        return self.shift([-offset for offset in outer.offsets])

    def intersect(self, other: Extent) -> Extent:
        """The elements of both; empty if there is none."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        stops = map(min, self.stops, other.stops)
        return Extent(offsets, tuple(max(0, stop - start) for start, stop in zip(offsets, stops, strict=True)))

    def split(self, run: Extent) -> Iterator[Extent]:
        """Cover a run of this extent's flattened elements by at most ``2 * len(sizes) - 1`` extents, in its order.

        Args:
            run: a flat extent, within ``[0, numel)``.
        """
        (start,), (stop,) = run.offsets, run.stops
        for extent in _cover(self.sizes, start, stop):
            yield extent.shift(self.offsets)


def _cover(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Extent]:
    if start >= stop:
        return
    if not shape:
        yield Extent((), ())
        return
    inner = shape[1:]
    row = prod(inner)
    first, head = divmod(start, row)
    last, tail = divmod(stop, row)
    if first == last:
        yield from _in_row(first, _cover(inner, head, tail))
        return
    if head:
        yield from _in_row(first, _cover(inner, head, row))
        first += 1
    if first < last:
        yield Extent((first, *[0] * len(inner)), (last - first, *inner))
    yield from _in_row(last, _cover(inner, 0, tail))


def _in_row(index: int, extents: Iterator[Extent]) -> Iterator[Extent]:
    for extent in extents:
        yield Extent((index, *extent.offsets), (1, *extent.sizes))
