"""A safetensors file: its table is checked before anything is read, and elements are read and written at their places.

A file is eight bytes, a table in JSON of that length, and the elements of one tensor after another. Nothing in it is
ever run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_tex.parallel.errors import UserFileError, UserValueError
from lightning_tex.parallel.extent import Extent
from lightning_tex.saving.archive import elements

SUFFIX = ".safetensors"
# What is read or written at once; of a tensor that takes more, one slab after the other.
SLAB_BYTES = 32 << 20
# The format's own bound.
_LARGEST_TABLE = 100_000_000
_ALIGNMENT = 8

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Readable(Protocol):
    """A tensor that can be read in parts: one of a file, or one that is made of some of them."""

    @property
    def name(self) -> str:
        """Of the tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """In which elements are read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all of it."""

    def read(self, files: TensorFiles, extent: Extent) -> Tensor:
        """Some elements, in the shape of their extent."""


class StoredTensor(NamedTuple):
    """A tensor in a file.

    Args:
        name: in the file's table.
        dtype: of its elements.
        shape: of all of it.
        file: where it is.
        start: its first byte there.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of all its elements."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self, files: TensorFiles, extent: Extent) -> Tensor:
        """See :meth:`TensorFiles.read`."""
        return files.read(self, extent)


def read_table(path: Path) -> list[StoredTensor]:
    """The tensors of a file, none of which is read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, is cut short or longer than its table says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_TABLE):
                raise UserValueError(
                    f"{path} is cut short or no safetensors file: {size} bytes, of which its table would be {length}"
                )
            table = json.loads(file.read(length))
        stored = [_entry(name, entry, path, 8 + length) for name, entry in table.items() if name != "__metadata__"]
    except FileNotFoundError:
        raise UserFileError(f"there is no {path}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, UserValueError):
            raise
        raise UserValueError(f"{path} has a damaged table of tensors: {type(error).__name__}: {error}") from error
    end = 8 + length
    for tensor in sorted(stored, key=lambda tensor: (tensor.start, tensor.nbytes)):
        if tensor.start != end:
            raise UserValueError(f"{path} has a damaged table: {tensor.name} begins at byte {tensor.start}, not {end}")
        end += tensor.nbytes
    if end != size:
        raise UserValueError(f"{path} is damaged: its table needs {end} bytes, the file has {size}")
    return stored


def _entry(name: str, entry: Mapping[str, Any], path: Path, data: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise UserValueError(f"{path}: {name} is of type {entry['dtype']}; legal: {', '.join(DTYPES)}")
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
        raise UserValueError(f"{path}: {name} has sizes {entry['shape']} and offsets {entry['data_offsets']}")
    tensor = StoredTensor(name, DTYPES[entry["dtype"]], shape, path, data + begin)
    if tensor.nbytes != end - begin:
        raise UserValueError(f"{path}: {name} of shape {list(shape)} has {end - begin} bytes, not {tensor.nbytes}")
    return tensor


def laid_out(path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> list[StoredTensor]:
    """Where tensors go in a new file, in their order, and so what :func:`create` writes."""
    data = len(_head(tensors))
    stored, at = [], data
    for name, (dtype, shape) in tensors.items():
        stored.append(StoredTensor(name, dtype, shape, path, at))
        at += stored[-1].nbytes
    return stored


def create(path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """A new file of these tensors, whose elements are still to be written.

    Raises:
        OSError: it exists, or there is no room.
    """
    head = _head(tensors)
    size = len(head) + sum(prod(shape) * dtype.itemsize for dtype, shape in tensors.values())
    with path.open("xb") as file:
        file.write(head)
        file.flush()
        file.truncate(size)
        with suppress(OSError):  # a file system that knows no reservation tells of missing room later
            os.posix_fallocate(file.fileno(), 0, size)


def _head(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = prod(shape) * dtype.itemsize
        table[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


class TensorFiles:
    """Open files, to read and write elements at their places. A context: they are closed at its end.

    Args:
        writes: elements will be written, to files that :func:`create` made.
    """

    def __init__(self, writes: bool = False) -> None:
        self._flags = os.O_RDWR if writes else os.O_RDONLY
        self._open: dict[Path, int] = {}
        self.moved_bytes = 0

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open = {}

    def read(self, stored: StoredTensor, extent: Extent) -> Tensor:
        """Some elements, in the shape of their extent; nothing else is read.

        Raises:
            ValueError: the file has been cut short since its table was read.
        """
        target = torch.empty(extent.sizes, dtype=stored.dtype)
        descriptor, view = self._descriptor(stored.file), elements(target)
        for place, (begin, end) in runs(stored, extent):
            while begin < end:
                count = os.preadv(descriptor, [view[begin:end]], place)
                if not count:
                    raise UserValueError(f"{stored.file} has been cut short while {stored.name} was read")
                begin, place, self.moved_bytes = begin + count, place + count, self.moved_bytes + count
        return target

    def write(self, stored: StoredTensor, extent: Extent, value: Tensor) -> None:
        """Write some elements, which are in host memory and in the file's dtype.

        Raises:
            OSError: there is no room.
        """
        descriptor, view = self._descriptor(stored.file), elements(value.contiguous())
        for place, (begin, end) in runs(stored, extent):
            while begin < end:
                count = os.pwrite(descriptor, view[begin:end], place)
                begin, place, self.moved_bytes = begin + count, place + count, self.moved_bytes + count

    def sync(self) -> None:
        """Bring to disk what was written."""
        for descriptor in self._open.values():
            os.fsync(descriptor)

    def _descriptor(self, path: Path) -> int:
        if path not in self._open:
            self._open[path] = os.open(path, self._flags)
        return self._open[path]


def runs(stored: StoredTensor, extent: Extent) -> Iterator[tuple[int, tuple[int, int]]]:
    """The bytes of an extent that lie one behind the other: their place in the file, and in the extent's own bytes."""
    if not extent.numel:
        return
    sizes, size = extent.sizes, stored.dtype.itemsize
    inner = len(sizes)  # dims from here on are whole, but for the first of them
    while inner and sizes[inner:] == stored.shape[inner:]:
        inner -= 1
    length = prod(sizes[inner:]) * size
    strides = Extent.whole(stored.shape).strides
    first = stored.start + size * sum(offset * stride for offset, stride in zip(extent.offsets, strides, strict=True))
    for number, index in enumerate(product(*map(range, sizes[:inner]))):
        place = first + size * sum(i * stride for i, stride in zip(index, strides, strict=False))
        yield place, (number * length, (number + 1) * length)


def slabs(extent: Extent, itemsize: int, most: int = SLAB_BYTES) -> Iterator[Extent]:
    """An extent in parts of about ``most`` bytes, cut along its first dims."""
    if extent.numel * itemsize <= most or not extent.sizes:
        yield extent
        return
    dim = next(dim for dim, size in enumerate(extent.sizes) if size > 1)
    row = extent.numel // extent.sizes[dim] * itemsize
    count = max(1, most // row)
    for begin in range(0, extent.sizes[dim], count):
        offsets, sizes = list(extent.offsets), list(extent.sizes)
        offsets[dim], sizes[dim] = offsets[dim] + begin, min(count, sizes[dim] - begin)
        part = Extent(tuple(offsets), tuple(sizes))
        yield from slabs(part, itemsize, most) if count == 1 else (part,)
