"""The store on any ``fsspec`` file system, by what all of them can do: put a whole file, list, read ranges, remove.

There is no rename. A checkpoint's files are put under a hidden name, its manifest last; then its name is put, one small
file that leads there (:mod:`.pointer`). A save that was cut off has no name and no manifest.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from lightning_tex.saving import paths, pointer
from lightning_tex.saving.archive import NewFile
from lightning_tex.saving.manifest import MANIFEST
from lightning_tex.saving.remote_path import RemotePath
from lightning_tex.saving.store import Store

_MARK = "mark"


class StagedFile(NewFile):
    """A file that is put together in host memory and put at once, so that a request that fails can be repeated."""

    def _opened(self) -> IO[bytes]:
        return io.BytesIO()

    def _bring_home(self) -> None:
        assert isinstance(self._file, io.BytesIO) and isinstance(self.path, RemotePath)
        self.path.write_bytes(self._file.getvalue())


class RemoteStore(Store[RemotePath]):
    """Names are pointers, each put by one request."""

    part_bytes = 128 << 20

    def unfinished(self, path: RemotePath) -> RemotePath:
        """The name that the directory will keep."""
        return paths.hidden(path)

    def prepare(self, path: RemotePath, unfinished: RemotePath) -> None:
        paths.require_replaceable(path)
        unfinished.mkdir()

    def new_file(self, path: RemotePath, expected_bytes: int) -> NewFile:
        return StagedFile(path, expected_bytes)

    def install(self, unfinished: RemotePath, path: RemotePath, linked: bool) -> None:
        """By one request, whether or not there is something of this name."""
        self._lead(path, unfinished)

    @contextmanager
    def single_file(self, path: RemotePath) -> Iterator[RemotePath]:
        """The name itself: a file is put whole."""
        before = path.resolve()
        yield path
        if paths.is_version(before, path):
            self.remove(before)

    def link(self, target: RemotePath, path: RemotePath) -> None:
        paths.require_replaceable(path)
        self._lead(path, target)

    def _lead(self, path: RemotePath, target: RemotePath) -> None:
        """Let ``path`` lead to ``target`` beside it, and remove its other versions, also those that were cut off."""
        assert target.parent == path.parent, f"{target} is not beside {path}"
        if path.is_dir():  # copied here; until the pointer is put, find() gives the new one
            self.remove(path)
        path.write_bytes(pointer.to_bytes(target.name))
        for version in paths.versions(path):
            if version != target:
                self.remove(version)

    def remove(self, path: RemotePath) -> None:
        """A name goes first, then the manifest without which no directory is a checkpoint, then all else."""
        content = path.resolve()
        is_name = content != path or not path.is_dir()
        if is_name:
            path.unlink()
        if not is_name or paths.is_version(content, path):
            (content / MANIFEST).unlink()
            content.remove_tree()

    # --- a folder that checkpoints will be written to

    def make_folder(self, folder: RemotePath) -> list[RemotePath]:
        """Nothing that would have to be removed."""
        folder.mkdir()
        for mark in paths.versions(folder / _MARK):
            mark.unlink()
        return []

    def remove_folder(self, folder: RemotePath) -> None:
        """Nothing: :meth:`make_folder` tells of none."""

    def put_mark(self, folder: RemotePath) -> RemotePath:
        mark = paths.hidden(folder / _MARK)
        mark.write_bytes(b"?")
        return mark

    def remove_mark(self, mark: RemotePath) -> None:
        mark.unlink()
