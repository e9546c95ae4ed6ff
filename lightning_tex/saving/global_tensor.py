"""A tensor described globally, of which this rank holds some extents."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_tex.parallel.box import Box
from lightning_tex.parallel.extent import Extent


class Part(NamedTuple):
    """Elements held here: which of the global tensor, and how to get them in that extent's shape.

    What ``read`` gives is memory to read into, where a checkpoint is read; what is written may be put together anew.
    """

    extent: Extent
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, offsets: tuple[int, ...], tensor: Tensor) -> Part:
        """The extent that a tensor fills from ``offsets`` on."""
        return cls(Extent(offsets, tuple(tensor.shape)), lambda: tensor)


class GlobalTensor:
    """A description of a global tensor, without memory of its own: nothing can be computed with it.

    Args:
        shape: the global shape.
        dtype: of the elements.
        parts: what this rank holds; disjoint. Reading fills them in place.
        writes: whether this rank is the one that writes them.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, parts: Iterable[Part] = (), writes: bool = True
    ) -> None:
        self.shape, self.dtype, self.writes = shape, dtype, writes
        # An empty extent says nothing, except that an empty tensor exists.
        self.parts = [part for part in parts if part.extent.numel or not prod(shape)]

    @classmethod
    def whole(cls, tensor: Tensor, writes: bool = True) -> GlobalTensor:
        """A tensor that is here as a whole."""
        return cls(tuple(tensor.shape), tensor.dtype, [Part.of((0,) * tensor.dim(), tensor)], writes)

    def __repr__(self) -> str:
        return f"GlobalTensor({self.shape}, {self.dtype}, {len(self.parts)} parts here)"


def stored_part(box: Box, stored: Tensor) -> Part:
    """A stored tensor without its padding, as a view."""
    return Part.of(box.extent.offsets, box.unpadded(stored))
