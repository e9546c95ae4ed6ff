"""What a rank writes, in files of bounded size: a store that puts whole files holds no more than one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from torch import Tensor

from lightning_tex.parallel.extent import Extent
from lightning_tex.saving.global_tensor import GlobalTensor, Part
from lightning_tex.saving.model_state import TensorPath


def in_files(
    tensors: Mapping[TensorPath, GlobalTensor], most_bytes: int | None
) -> Iterator[dict[TensorPath, GlobalTensor]]:
    """The same elements, file by file; a part that is too large is split.

    Args:
        most_bytes: of elements in one file; ``None``: all in one.
    """
    if most_bytes is None:
        if tensors:
            yield dict(tensors)
        return
    file: dict[TensorPath, GlobalTensor] = {}
    filled = 0
    for path, tensor in tensors.items():
        for part in tensor.parts:
            for piece in _pieces(part, max(1, most_bytes // tensor.dtype.itemsize)):
                size = piece.extent.numel * tensor.dtype.itemsize
                if file and filled + size > most_bytes:
                    yield file
                    file, filled = {}, 0
                file.setdefault(path, GlobalTensor(tensor.shape, tensor.dtype)).parts.append(piece)
                filled += size
    if file:
        yield file


def _pieces(part: Part, most: int) -> Iterator[Part]:
    """Halves, and halves of these, of at most so many elements; each is contiguous in the part."""
    if part.extent.numel <= most:
        yield part
        return
    offsets, sizes = part.extent.offsets, part.extent.sizes
    dim = next(dim for dim, size in enumerate(sizes) if size > 1)
    middle = sizes[dim] // 2
    for start, length in ((0, middle), (middle, sizes[dim] - middle)):
        first = (*offsets[:dim], offsets[dim] + start, *offsets[dim + 1 :])
        extent = Extent(first, (*sizes[:dim], length, *sizes[dim + 1 :]))
        yield from _pieces(Part(extent, partial(_own, part, dim, start, length)), most)


def _own(part: Part, dim: int, start: int, length: int) -> Tensor:
    """Some rows in memory of their own: the whole memory of a tensor is written."""
    return part.read().narrow(dim, start, length).clone()
