"""A name on a file system that is not mounted, in the words of :mod:`pathlib`; any that ``fsspec`` knows.

Files are put whole and read by ranges. Where there are no links, a name may be a pointer (:mod:`.pointer`).
"""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol

from lightning_tex.parallel.errors import UserRuntimeError, UserValueError
from lightning_tex.saving import pointer
from lightning_tex.saving.retrying import repeated

# A request asks for at most so many bytes; who reads on gets so many at once.
RANGE_BYTES = 32 << 20
_MOST_POINTERS = 4


@dataclass(frozen=True, order=True)
class RemotePath(os.PathLike[str]):
    """A file or directory by its URL. Nothing is remembered of it: every question is a request.

    Args:
        url: with its protocol, such as ``s3://bucket/run``; without a slash at its end.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __fspath__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The last ending of the name, with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """The folder that it lies in."""
        protocol, separator, path = self.url.rpartition("://")
        return RemotePath(protocol + separator + path.rpartition("/")[0])

    def with_name(self, name: str) -> RemotePath:
        """Another name beside this one."""
        return self.parent / name

    def absolute(self) -> RemotePath:
        """Itself."""
        return self

    # --- what is there

    def _place(self) -> tuple[Any, str]:
        """The file system, as this process and thread may use it, and the path on it."""
        try:
            file_system, path = url_to_fs(self.url)
        except (ImportError, ValueError) as error:  # a protocol that is not known, or whose package is missing
            raise UserValueError(f"{self} cannot be reached: {error}") from error
        # Other processes write, too: a listing of before is no answer.
        file_system.invalidate_cache()
        return file_system, path

    def _facts(self) -> Mapping[str, Any] | None:
        file_system, path = self._place()
        try:
            facts: Mapping[str, Any] = repeated(lambda: file_system.info(path), self)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return facts

    def exists(self) -> bool:
        """Whether there is a file or directory of this name."""
        return self._facts() is not None

    def is_file(self) -> bool:
        """Whether it is a file; a pointer is one."""
        facts = self._facts()
        return facts is not None and facts["type"] != "directory"

    def is_dir(self) -> bool:
        """Whether it is a directory; a pointer is none."""
        facts = self._facts()
        return facts is not None and facts["type"] == "directory"

    def size(self) -> int | None:
        """Of a file, in bytes; ``None``: there is none, or it is not known."""
        facts = self._facts()
        return None if facts is None or facts["type"] == "directory" else facts.get("size")

    def modified(self) -> float:
        """When a file was written, in seconds since 1970; 0 where its file system does not know."""
        file_system, path = self._place()
        try:
            time: datetime = repeated(lambda: file_system.modified(path), self)
        except (NotImplementedError, KeyError):
            return 0.0
        return time.timestamp()

    def iterdir(self) -> Iterator[RemotePath]:
        """What lies in a directory."""
        return (self / name for name in self._listed())

    def sizes(self, names: Collection[str]) -> dict[str, int | None]:
        """The sizes of some files in a directory, by one request where it can be listed."""
        try:
            listed = self._listed()
        except (OSError, NotImplementedError):
            listed = {}
        known = {name: listed.get(name) for name in names}
        return {name: (self / name).size() if size is None else size for name, size in known.items()}

    def _listed(self) -> dict[str, int | None]:
        file_system, path = self._place()
        entries = repeated(lambda: file_system.ls(path, detail=True), self)
        paths = {entry["name"].rstrip("/"): entry for entry in entries}
        itself = paths.pop(str(path).rstrip("/"), None)  # as object stores list an empty folder, or a file
        if itself is not None and itself["type"] != "directory":
            raise NotADirectoryError(f"{self} is a file")
        return {
            name.rpartition("/")[2]: None if entry["type"] == "directory" else entry.get("size")
            for name, entry in paths.items()
        }

    def resolve(self) -> RemotePath:
        """What a pointer leads to; all else is itself."""
        place = self
        for _ in range(_MOST_POINTERS):
            target = place._leads_to()
            if target is None:
                return place
            place = place.with_name(target)
        return place

    def _leads_to(self) -> str | None:
        facts = self._facts()
        if facts is None or facts["type"] == "directory" or (facts.get("size") or 0) > pointer.MOST_BYTES:
            return None
        return pointer.target_of(self.read_bytes())

    # --- bytes

    def read_bytes(self) -> bytes:
        """A whole file."""
        file_system, path = self._place()
        content: bytes = repeated(lambda: file_system.cat_file(path), self)
        return content

    def read_range(self, first: int, last: int) -> bytes:
        """Bytes ``[first, last)`` of a file; a web server that does not know ranges sends the whole file."""
        file_system, path = self._place()
        content: bytes = repeated(lambda: file_system.cat_file(path, start=first, end=last), self)
        return content

    def open(self, mode: str = "rb", buffering: int = -1) -> io.RawIOBase | io.BufferedReader:
        """A file to read, by ranges."""
        assert mode == "rb", mode
        raw = _Ranges(self, self.size())
        return raw if buffering == 0 else io.BufferedReader(raw)

    def write_bytes(self, content: bytes) -> None:
        """Put a whole file, in the place of one that there may be."""
        file_system, path = self._place()
        repeated(lambda: file_system.pipe_file(path, content), self)

    def mkdir(self) -> None:
        """Make a directory and those around it, where a file system has any."""
        file_system, path = self._place()
        repeated(lambda: file_system.makedirs(path, exist_ok=True), self)

    def unlink(self) -> None:
        """Remove a file; nothing if it is gone."""
        file_system, path = self._place()
        with suppress(FileNotFoundError):
            repeated(lambda: file_system.rm_file(path), self)

    def remove_tree(self) -> None:
        """Remove a directory with the files in it; nothing if it is gone."""
        file_system, path = self._place()
        with suppress(FileNotFoundError):
            for file in repeated(lambda: file_system.find(path), self):
                with suppress(FileNotFoundError):
                    repeated(partial(file_system.rm_file, file), file)
        with suppress(OSError, NotImplementedError):  # object stores have no directory without files
            file_system.rmdir(path)


class _Ranges(io.RawIOBase):
    """A remote file to read: what is asked for, and more at once where one reads on.

    Args:
        path: of the file.
        size: in bytes.

    Raises:
        FileNotFoundError: there is none whose size is known.
    """

    def __init__(self, path: RemotePath, size: int | None) -> None:
        if size is None:
            raise FileNotFoundError(f"there is no file {path} whose size is known")
        self._path, self._size, self._at = path, size, 0
        self._held, self._held_from = memoryview(b""), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        wanted = min(len(target), self._size - self._at)
        if wanted <= 0:
            return 0
        if not self._held_from <= self._at < self._held_from + len(self._held):
            self._fetch(wanted)
        begin = self._at - self._held_from
        got = self._held[begin : begin + wanted]
        target[: len(got)] = got
        self._at += len(got)
        return len(got)

    def _fetch(self, wanted: int) -> None:
        reads_on = len(self._held) > 0 and self._at == self._held_from + len(self._held)
        length = RANGE_BYTES if reads_on else min(wanted, RANGE_BYTES)
        last = min(self._at + length, self._size)
        self._held, self._held_from = memoryview(self._path.read_range(self._at, last)), self._at
        if len(self._held) > last - self._at:
            if len(self._held) != self._size:
                raise UserRuntimeError(
                    f"{self._path}: asked for {last - self._at:,} bytes from {self._at:,} on, {len(self._held):,} came"
                )
            self._held_from = 0


# A name on a mounted file system, or on another one: both have the same words for what checkpoints need.
Location = Path | RemotePath


def at(path: str | os.PathLike[str]) -> Location:
    """Where a path or URL leads; ``file://`` is a path."""
    if isinstance(path, RemotePath):
        return path
    if _is_local_file_protocol(str(path)):
        return path if isinstance(path, Path) else Path(_without_protocol(os.fspath(path)))
    return RemotePath(str(path).rstrip("/"))


def _without_protocol(path: str) -> str:
    if path.startswith(("file:", "local:")):
        return str(LocalFileSystem._strip_protocol(path))
    return path
