"""A rank's rectangular part of a tensor: which elements, with what padding, and which of them a flat run holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_tex.parallel.extent import Extent
from lightning_tex.parallel.topology import Axis


@dataclass(frozen=True)
class Box:
    """A rank's rectangular part of a tensor. The stored part may be longer than the extent: the rest is padding.

    Args:
        full: the global shape.
        stored: shape of the rank's tensor, equal on all ranks.
        extent: the elements that are not padding, in the whole tensor.
    """

    full: tuple[int, ...]
    stored: tuple[int, ...]
    extent: Extent

    @classmethod
    def of(cls, full: torch.Size | tuple[int, ...], shard_dims: list[tuple[Axis, int]]) -> Box:
        stored, offsets, sizes = list(full), [0] * len(full), list(full)
        for axis, dim in shard_dims:
            part = -(-full[dim] // axis.size)
            start = min(axis.rank * part, full[dim])
            stored[dim], offsets[dim], sizes[dim] = part, start, min(part, full[dim] - start)
        return cls(tuple(full), tuple(stored), Extent(tuple(offsets), tuple(sizes)))

    def shard(self, full: Tensor) -> Tensor:
        """This rank's part of a whole tensor, padded with zeros to the stored shape."""
        padding = [pad for n, size in zip(self.stored, self.extent.sizes, strict=True) for pad in (n - size, 0)][::-1]
        return F.pad(full[self.extent.slices], padding).clone(memory_format=torch.contiguous_format)

    def unpadded(self, stored: Tensor) -> Tensor:
        """The part of a stored tensor that is not padding, as a view."""
        return stored[tuple(slice(size) for size in self.extent.sizes)]

    def of_run(self, run: Extent, start: int = 0) -> Iterator[tuple[Extent, Callable[[Tensor], Tensor]]]:
        """Which elements of the whole tensor some consecutive ones of the flattened stored part are, without padding.

        Args:
            run: which elements of the flattened stored part.
            start: where the first of them is in the flat tensor that views are of.

        Yields:
            extents of the whole tensor, each with what gives a view of its elements, in its shape, of such a tensor.
        """
        unpadded = Extent.whole(self.extent.sizes)
        for extent in Extent.whole(self.stored).split(run):
            inside = extent.intersect(unpadded)
            if inside.numel:
                place = slice(start, start + extent.numel)
                yield inside.shift(self.extent.offsets), partial(_viewed, place, extent.sizes, inside.sizes)
            start += extent.numel


def _viewed(place: slice, sizes: tuple[int, ...], unpadded: tuple[int, ...], values: Tensor) -> Tensor:
    return values[place].view(sizes)[tuple(map(slice, unpadded))]
