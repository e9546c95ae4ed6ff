"""A rank's file of tensors: one ``torch.save`` archive after another, as torch.distributed.checkpoint lays them out.

Others' tools read the archives. Ours reads the bare elements inside them, whose places it noted when writing.
"""

from __future__ import annotations

import io
import os
import shutil
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from lightning_tex.saving.remote_path import Location


class NewFile(io.RawIOBase):
    """A file that is written once, digested while it is, and on disk for good when finished.

    On other stores a subclass brings it there.

    Args:
        path: where nothing is yet.
        expected_bytes: how much is going to be written, about; for messages.
    """

    def __init__(self, path: Location, expected_bytes: int) -> None:
        self.path, self._expected_bytes = path, expected_bytes
        self.position = 0
        self._failure: OSError | None = None
        self._digest = xxhash.xxh3_128()
        self._file = self._opened()

    def _opened(self) -> IO[bytes]:
        """What is written to, and read again while it is."""
        assert isinstance(self.path, Path)
        return self.path.open("x+b")

    def _bring_home(self) -> None:
        """Let everything written be where it is to stay."""
        os.fsync(self._file.fileno())

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        # torch.save makes an error of its own of what went wrong in here.
        if isinstance(error, RuntimeError) and self._failure is not None:
            raise self._failure from None

    def write(self, data: Any) -> int:
        with self._told():
            self._digest.update(data)
            self._file.write(data)
        self.position += len(data)
        return len(data)

    def flush(self) -> None:
        if not self._file.closed:
            with self._told():
                self._file.flush()

    def place_of(self, begin: int, ending: str) -> int:
        """The first byte of the one entry of such a name in the archive written from ``begin`` on."""
        self.flush()
        start = begin + stored_entry(_Window(self._file, begin, self.position), ending)[0]
        self._file.seek(self.position)
        return start

    def finish(self) -> FileRecord:
        """Bring it to disk, read it back, and give what it is.

        Raises:
            OSError: it cannot be written.
            CorruptCheckpointError: what is read back is something else.
        """
        with self._told():
            self._file.flush()
            self._bring_home()
            self._file.close()
        written = FileRecord(self.position, self._digest.hexdigest())
        if problem := difference(self.path, written, file_record(self.path)):
            raise CorruptCheckpointError(f"{problem}, right after it was written")
        return written

    def close(self) -> None:
        try:
            self._file.close()
        except OSError:  # what is in its buffer has no room either
            if self._failure is None:
                raise
        super().close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._failure = with_room(error, self.path, self._expected_bytes)
            raise self._failure from None


def with_room(error: OSError, path: Location, needed_bytes: int) -> OSError:
    """The error of a write, with what was to be written and what room there is."""
    try:
        free = f"{shutil.disk_usage(path.parent).free:,} are free there"
    except OSError:
        free = "how many are free there is not known"
    return OSError(error.errno, f"{error.strerror or error}; {path} needs {needed_bytes:,} bytes, {free}")


def write_file(file: NewFile, content: bytes) -> FileRecord:
    """Write the whole of a file for good."""
    with file:
        file.write(content)
        return file.finish()


def write_tensors(file: NewFile, tensors: Mapping[TensorPath, GlobalTensor]) -> tuple[FileRecord, list[TensorRecord]]:
    """Write the whole of a file of tensors.

    Args:
        tensors: whose parts give contiguous elements in host memory, with no others around them.

    Returns:
        the file's record, and for each tensor the extents that lie in it.
    """
    with file:
        records = []
        for name, tensor in tensors.items():
            extents = [_write_part(file, part) for part in tensor.parts]
            records.append(TensorRecord(name, tensor.shape, tensor.dtype, extents))
        return file.finish(), records


def _write_part(file: NewFile, part: Part) -> StoredExtent:
    tensor = part.read()
    begin = file.position
    torch.save(tensor, file)  # type: ignore[arg-type]
    data = elements(tensor)
    chunks = tuple(digest(data[at : at + CHUNK_BYTES]) for at in range(0, len(data), CHUNK_BYTES))
    start = file.place_of(begin, "/data/0")
    return StoredExtent(part.extent, file.path.name, start, (begin, file.position - begin), chunks)


def elements(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory, not copied."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def stored_entry(archive: IO[bytes] | io.RawIOBase, ending: str) -> tuple[int, int]:
    """First byte and length of the one entry of a ``torch.save`` archive with such a name; it is not compressed.

    Raises:
        zipfile.BadZipFile: it is no archive, or a cut one.
        ValueError: it has no such entry, or several.
    """
    with zipfile.ZipFile(archive) as entries:
        (entry,) = (info for info in entries.infolist() if info.filename.endswith(ending))
    archive.seek(entry.header_offset + 26)
    name, extra = struct.unpack("<HH", archive.read(4) or b"")
    return int(entry.header_offset + 30 + name + extra), entry.file_size


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


def read_elements(path: Location, stored: StoredExtent, dtype: torch.dtype, first: int, last: int) -> Tensor:
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
