"""A tensor described globally, of which this rank holds some boxes, for torch.distributed.checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from lightning_tex.placement import Box
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


class GlobalTensor(torch.Tensor):
    """A description of a global tensor, without memory of its own.

    It is a tensor only because torch.distributed.checkpoint asks for one; nothing can be computed with it.

    Args:
        shape: the global shape.
        dtype: of the elements.
        parts: the boxes this rank holds; disjoint. Reading fills them in place.
        writes: whether this rank is the one that writes them.
    """

    parts: list[Part]
    writes: bool

    @staticmethod
    def __new__(
        cls, shape: Extent, dtype: torch.dtype, parts: Iterable[Part] = (), writes: bool = True
    ) -> GlobalTensor:
        tensor: GlobalTensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        # An empty box says nothing, except that an empty tensor exists.
        tensor.parts = [part for part in parts if prod(part.sizes) or not prod(shape)]
        tensor.writes = writes
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{function} of a GlobalTensor: it describes where elements are saved, it holds none")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"GlobalTensor({tuple(self.shape)}, {self.dtype}, {len(self.parts)} boxes here)"

    # --- the protocol of torch.distributed.checkpoint

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        if not self.writes:
            return []
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes)) for part in self.parts]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(part.read() for part in self.parts if torch.Size(part.offsets) == index.offset)


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
