"""The store on mounted file systems: hidden directories, and one rename or link that gives them their name.

A name that is written again and again (``last.ckpt``) is a link to the newest, swapped by a rename.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_tex.saving import paths
from lightning_tex.saving.archive import NewFile
from lightning_tex.saving.paths import PARTIAL, REMOVED, TOKEN
from lightning_tex.saving.store import Store

# What is tried to be written.
_PROBE = "probe"


class LocalStore(Store[Path]):
    """Names are changed by renames, which are atomic."""

    part_bytes = None

    def unfinished(self, path: Path) -> Path:
        return paths.partial_name(path)

    def prepare(self, path: Path, unfinished: Path) -> None:
        paths.require_replaceable(path)
        self.remove_leftovers(path)
        unfinished.mkdir(parents=True)

    def new_file(self, path: Path, expected_bytes: int) -> NewFile:
        return NewFile(path, expected_bytes)

    def remove_leftovers(self, path: Path) -> None:
        """Remove what was cut off: saves to ``path``, versions of it that no name leads to, removals in its folder."""
        current = path.resolve()
        for gone in path.parent.glob(f".*{REMOVED}"):
            if re.search(rf"\.{TOKEN}{re.escape(REMOVED)}$", gone.name):
                shutil.rmtree(gone, ignore_errors=True)
        for version in paths.versions(path):
            if version.name.endswith(PARTIAL) or (os.path.lexists(path) and version.resolve() != current):
                self.remove(version)

    def install(self, unfinished: Path, path: Path, linked: bool) -> None:
        """By one rename.

        Args:
            linked: make ``path`` a link from the start. A name that exists becomes one.
        """
        sync(unfinished)
        if not linked and not os.path.lexists(path):
            os.rename(unfinished, path)
            sync(path.parent)
            return
        version = paths.hidden(path)
        os.rename(unfinished, version)
        before = self._out_of_the_way(path)
        _swap_link(version.name, path)
        if paths.is_version(before, path):
            self.remove(before)

    @contextmanager
    def single_file(self, path: Path) -> Iterator[Path]:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = paths.partial_name(path)
        try:
            yield new
            self._install_file(new, path)
        finally:
            self.remove(new)

    def _install_file(self, new: Path, path: Path) -> None:
        """Let ``path`` be the file ``new`` by one rename, and remove what a link or directory there stood for."""
        before = self._out_of_the_way(path)
        with new.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
        sync(path.parent)
        if before != path and paths.is_version(before, path):
            self.remove(before)

    def link(self, target: Path, path: Path) -> None:
        paths.require_replaceable(path)
        before = self._out_of_the_way(path)
        _swap_link(os.path.relpath(target.absolute(), path.parent.absolute()), path)
        if paths.is_version(before, path):
            self.remove(before)

    def _out_of_the_way(self, path: Path) -> Path:
        """Where lies what ``path`` stands for, once something else can take the name.

        A directory with content cannot be replaced: for a moment only its hidden versions exist.
        """
        if path.is_dir() and not path.is_symlink():
            before = paths.hidden(path)
            os.rename(path, before)
            return before
        return path.resolve()

    def remove(self, path: Path) -> None:
        """Remove a file, a directory, or a link with the version behind it, if there is one.

        A directory loses its name first.
        """
        if path.is_symlink():
            version = path.resolve()
            path.unlink()
            if version.parent == path.parent.resolve() and paths.is_version(version, path):
                self.remove(version)
        elif path.is_dir():
            gone = paths.hidden(path, REMOVED)
            os.rename(path, gone)
            shutil.rmtree(gone, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    # --- a folder that checkpoints will be written to

    def make_folder(self, folder: Path) -> list[Path]:
        missing = [place for place in (folder, *folder.parents) if not place.exists()][::-1]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            for place in reversed(missing):
                self.remove_folder(place)
            raise
        self.remove_leftovers(folder / _PROBE)
        return missing

    def remove_folder(self, folder: Path) -> None:
        with suppress(OSError):
            folder.rmdir()

    def put_mark(self, folder: Path) -> Path:
        mark = paths.partial_name(folder / _PROBE)
        try:
            mark.write_bytes(b"?")
        except OSError:
            self.remove_mark(mark)
            raise
        return mark

    def remove_mark(self, mark: Path) -> None:
        with suppress(OSError):
            mark.unlink(missing_ok=True)


def _swap_link(target: str, link: Path) -> None:
    """Make ``link`` lead to ``target``, relative to its folder, by one rename."""
    new = paths.partial_name(link)
    os.symlink(target, new)
    os.replace(new, link)
    sync(link.parent)


def sync(folder: Path) -> None:
    """Bring a folder's names to disk, where its file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
