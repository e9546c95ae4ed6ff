"""A rank's file of tensors: one ``torch.save`` archive after another, as torch.distributed.checkpoint lays them out.

Others' tools read the archives. Ours reads the bare elements inside them, whose places it noted when writing.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
from torch import Tensor

from lightning_tex.saving.global_tensor import GlobalTensor, Part
from lightning_tex.saving.manifest import (
    CHUNK_BYTES,
    CorruptCheckpointError,
    FileRecord,
    StoredExtent,
    TensorRecord,
    difference,
    digest,
    file_record,
)
from lightning_tex.saving.model_state import TensorPath


class NewFile(io.RawIOBase):
    """A file that is written once, digested while it is, and on disk for good when closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("xb")
        self._digest = xxhash.xxh3_128()
        self.position = 0

    def write(self, data: Any) -> int:
        self._digest.update(data)
        self._file.write(data)
        self.position += len(data)
        return len(data)

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def finish(self) -> FileRecord:
        """Bring it to disk, read it back, and give what it is.

        Raises:
            OSError: it cannot be written.
            CorruptCheckpointError: what is read back is something else.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        written = FileRecord(self.position, self._digest.hexdigest())
        if problem := difference(self.path, written, file_record(self.path)):
            raise CorruptCheckpointError(f"{problem}, right after it was written")
        return written

    def close(self) -> None:
        self._file.close()
        super().close()


def write_file(path: Path, content: bytes) -> FileRecord:
    """Write a whole file for good."""
    file = NewFile(path)
    try:
        file.write(content)
        return file.finish()
    finally:
        file.close()


def write_tensors(path: Path, tensors: Mapping[TensorPath, GlobalTensor]) -> tuple[FileRecord, list[TensorRecord]]:
    """Write a file of tensors.

    Args:
        tensors: whose parts give contiguous elements in host memory.

    Returns:
        the file's record, and for each tensor the extents that lie in it.
    """
    file = NewFile(path)
    try:
        with path.open("rb") as again:
            records = []
            for name, tensor in tensors.items():
                extents = [_write_part(file, again, part) for part in tensor.parts]
                records.append(TensorRecord(name, tensor.shape, tensor.dtype, extents))
        return file.finish(), records
    finally:
        file.close()


def _write_part(file: NewFile, again: IO[bytes], part: Part) -> StoredExtent:
    tensor = part.read()
    begin = file.position
    torch.save(tensor, file)  # type: ignore[arg-type]
    file.flush()
    end = file.position
    data = elements(tensor)
    chunks = tuple(digest(data[at : at + CHUNK_BYTES]) for at in range(0, len(data), CHUNK_BYTES))
    start = begin + _elements_position(_Window(again, begin, end))
    return StoredExtent(part.extent, file.path.name, start, (begin, end - begin), chunks)


def elements(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory, not copied."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _elements_position(archive: io.RawIOBase) -> int:
    """The first byte of the elements in a ``torch.save`` archive of one tensor, which holds them uncompressed."""
    with zipfile.ZipFile(archive) as entries:
        (entry,) = (info for info in entries.infolist() if info.filename.endswith("/data/0"))
    archive.seek(entry.header_offset + 26)
    name, extra = struct.unpack("<HH", archive.read(4) or b"")
    return int(entry.header_offset + 30 + name + extra)


class _Window(io.RawIOBase):
    """Some bytes of a file, as a file of their own to read."""

    def __init__(self, file: IO[bytes], begin: int, end: int) -> None:
        self._file, self._begin, self._length, self._at = file, begin, end - begin, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        rest = self._length - self._at
        self._file.seek(self._begin + self._at)
        data = self._file.read(rest if size < 0 else min(size, rest))
        self._at += len(data)
        return data


def read_elements(path: Path, stored: StoredExtent, dtype: torch.dtype, first: int, last: int) -> Tensor:
    """Elements ``[first, last)`` of a stored extent, flattened; each chunk with some of them is checked. [last - first]

    Raises:
        CorruptCheckpointError: a chunk is not what was written.
    """
    size = dtype.itemsize
    chunks = range(first * size // CHUNK_BYTES, -(-last * size // CHUNK_BYTES))
    begin = chunks.start * CHUNK_BYTES
    data = torch.empty(min(chunks.stop * CHUNK_BYTES, stored.extent.numel * size) - begin, dtype=torch.uint8)
    view = elements(data)
    with path.open("rb", buffering=0) as file:
        file.seek(stored.start + begin)
        filled = 0
        while filled < len(view) and (count := file.readinto(view[filled:])):
            filled += count
    for position, chunk in enumerate(chunks):
        actual = digest(view[position * CHUNK_BYTES : (position + 1) * CHUNK_BYTES])
        if filled < len(view) or actual != stored.chunks[chunk]:
            at = stored.start + chunk * CHUNK_BYTES
            raise CorruptCheckpointError(
                f"{path} has changed while it was read: at byte {at} expected xxh3_128 {stored.chunks[chunk]}, "
                f"found {actual}"
            )
    return data[first * size - begin : last * size - begin].view(dtype)
