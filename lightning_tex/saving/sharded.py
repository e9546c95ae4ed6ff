"""A tensor described globally, of which this rank holds some boxes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_tex.parallel.sharding import Box
from lightning_tex.saving.boxes import Extent, clipped, range_boxes


class Part(NamedTuple):
    """A box held here: its global offsets, its extent, and how to get the elements in that shape.

    What ``read`` gives is memory to read into, where a checkpoint is read; what is written may be put together anew.
    """

    offsets: Extent
    sizes: Extent
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, offsets: Extent, tensor: Tensor) -> Part:
        """The box that a tensor fills."""
        return cls(offsets, tuple(tensor.shape), lambda: tensor)


class GlobalTensor:
    """A description of a global tensor, without memory of its own: nothing can be computed with it.

    Args:
        shape: the global shape.
        dtype: of the elements.
        parts: the boxes this rank holds; disjoint. Reading fills them in place.
        writes: whether this rank is the one that writes them.
    """

    def __init__(self, shape: Extent, dtype: torch.dtype, parts: Iterable[Part] = (), writes: bool = True) -> None:
        self.shape, self.dtype, self.writes = shape, dtype, writes
        # An empty box says nothing, except that an empty tensor exists.
        self.parts = [part for part in parts if prod(part.sizes) or not prod(shape)]

    def __repr__(self) -> str:
        return f"GlobalTensor({self.shape}, {self.dtype}, {len(self.parts)} boxes here)"


def stored_part(box: Box, stored: Tensor) -> Part:
    """The box of a stored tensor, without its padding, as a view."""
    return Part.of(box.offsets, box.unpadded(stored))


def range_parts(box: Box, start: int, length: int, read: Callable[[], Tensor]) -> Iterator[Part]:
    """Boxes of some consecutive elements of a rank's stored, flattened part, without padding, as views.

    Args:
        box: the rank's part.
        start: position in the flattened stored part of the first element.
        length: how many, n.
        read: gives the elements. [n]
    """
    position = 0
    for offsets, sizes in range_boxes(box.stored, start, start + length):
        count = prod(sizes)
        inside = clipped(offsets, sizes, box.sizes)
        if 0 not in inside:
            at = tuple(a + b for a, b in zip(offsets, box.offsets, strict=True))
            yield Part(at, inside, partial(_within, read, slice(position, position + count), sizes, inside))
        position += count


def _within(read: Callable[[], Tensor], span: slice, sizes: Extent, inside: Extent) -> Tensor:
    return read()[span].view(sizes)[tuple(slice(size) for size in inside)]
