"""An object store that forked ranks share, as ``objects://`` of fsspec: objects are put whole; no renames, no links.

Its objects are files of a local folder, named by their quoted keys, so a prefix is no directory there either.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, unquote

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

_ROOT = "TESTS_OBJECTS"


class ObjectStore(AbstractFileSystem):
    """Keys and objects; every request that changes something is told to :attr:`before` first."""

    protocol = "objects"
    cachable = False
    before: ClassVar[Callable[[str, str], None]] = staticmethod(lambda request, key: None)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).removeprefix("objects://").strip("/")

    def _file(self, path: str) -> Path:
        return Path(os.environ[_ROOT], quote(self._strip_protocol(path), safe=""))

    def _sizes(self) -> dict[str, int]:
        return {unquote(file.name): file.stat().st_size for file in Path(os.environ[_ROOT]).iterdir()}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        prefix, found = self._strip_protocol(path), {}
        for key, size in self._sizes().items():
            if key == prefix:
                found[key] = {"name": key, "type": "file", "size": size}
            elif key.startswith(f"{prefix}/"):
                first = key.removeprefix(f"{prefix}/").partition("/")[0]
                name = f"{prefix}/{first}"
                kind = {"type": "file", "size": size} if name == key else {"type": "directory", "size": 0}
                found[name] = {"name": name, **kind}
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        key, sizes = self._strip_protocol(path), self._sizes()
        if key in sizes:
            return {"name": key, "type": "file", "size": sizes[key]}
        if any(other.startswith(f"{key}/") for other in sizes):
            return {"name": key, "type": "directory", "size": 0}
        raise FileNotFoundError(path)

    def modified(self, path: str) -> datetime:
        return datetime.fromtimestamp(self._file(path).stat().st_mtime, tz=UTC)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        return self._file(path).read_bytes()[start:end]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        self.before("put", self._strip_protocol(path))
        file = self._file(path)
        new = file.with_name(f"{os.getpid()}-{id(value)}")
        new.write_bytes(value)
        new.rename(file)

    def rm_file(self, path: str) -> None:
        self.before("remove", self._strip_protocol(path))
        self._file(path).unlink()

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return _Object(self, path, mode, **options)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: a prefix is there once an object is."""

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        raise NotImplementedError

    def mv(self, path1: str, path2: str, **_: Any) -> None:
        raise AssertionError("an object store has no rename")


class _Object(AbstractBufferedFile):
    """An object that is written or read through a buffer, as Lightning does."""

    def _initiate_upload(self) -> None:
        self.parts: list[bytes] = []

    def _upload_chunk(self, final: bool = False) -> bool:
        self.parts.append(self.buffer.getvalue())
        if final:
            self.fs.pipe_file(self.path, b"".join(self.parts))
        return True

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.cat_file(self.path, start, end)


fsspec.register_implementation("objects", ObjectStore, clobber=True)


def use_folder(folder: Path | str) -> None:
    """Keep the objects in this folder, in this process and those forked from it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    os.environ[_ROOT] = str(folder)
