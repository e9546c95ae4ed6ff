"""The newest complete whole state among the folders that a run can have written to: the one rule of the way back.

A *whole state* is all that training goes on from: weights, optimizer states, loops, schedulers. The newest has most
optimizer steps; of equal ones, what is said to be this run's own, then what a stop has written (where a limit of time
ends an epoch early, what is saved at its end would go on with the next one), then a directory before a plain file
(which has no random states), then what was written last. What is damaged, or leads nowhere, is passed over and
remembered.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from glob import escape
from typing import NamedTuple

from lightning_tex.parallel.errors import UserFileError
from lightning_tex.saving import paths
from lightning_tex.saving.contents import contents, holds_whole_state
from lightning_tex.saving.manifest import CorruptCheckpointError
from lightning_tex.saving.remote_path import Location, at
from lightning_tex.saving.trainer_state import TRAINER_STATE

# The checkpoint of a stop; the number of optimizer steps follows.
STOPPED = "stopped-step="


class Place(NamedTuple):
    """Where checkpoints may lie.

    Args:
        folder: directly in it.
        names: only those that match, as of :mod:`fnmatch`.
        suffix: of plain files, and of directories that must be checkpoints.
    """

    folder: Location
    names: str = "*"
    suffix: str = ".ckpt"


@dataclass(frozen=True)
class SavedState:
    """A checkpoint as far as its head tells.

    Args:
        path: where it lies.
        step: optimizer steps done.
        directory: whether it is one, or a plain file.
        written: when, in seconds since 1970.
    """

    path: Location
    step: int
    directory: bool
    written: float

    @classmethod
    def of(cls, path: Location) -> SavedState:
        """Read the head: a directory's manifest, or the top of a plain file.

        Raises:
            CorruptCheckpointError: there is nothing that could be read.
        """
        place = paths.behind(path)
        if not paths.is_directory(place):
            return cls(path, contents(place).step, False, paths.modified(place))
        manifest = paths.read_manifest(place)
        return cls(path, manifest.step, True, manifest.written)

    def is_whole(self) -> bool:
        """Whether it holds a whole state, and not weights only.

        Raises:
            CorruptCheckpointError: a file is missing or of another size. Digests are not compared; loading does.
        """
        if not self.directory:
            return holds_whole_state(contents(self.path).keys, directory=False)
        place = paths.behind(self.path)
        paths.manifest_of(place)
        return holds_whole_state(contents(place / TRAINER_STATE).keys, directory=True)


@dataclass
class Search:
    """Whole states in some places, the newest first; iterating reads no more than it must.

    Args:
        places: where to look.
        own: what the run itself has saved, which goes before all else.
        without: a path that is not wanted.

    Attributes:
        damaged: what was passed over so far, each with what is wrong.
        weights: checkpoints met so far that hold weights only.
        heads: all that can be read, the newest first; filled when iterating begins.
    """

    places: Sequence[Place]
    own: frozenset[Location] = frozenset()
    without: Location | None = None
    damaged: list[str] = field(default_factory=list)
    weights: list[SavedState] = field(default_factory=list)
    heads: list[SavedState] = field(default_factory=list)

    def __iter__(self) -> Iterator[SavedState]:
        self.heads = sorted(self._heads(), key=self._rank, reverse=True)
        for state in self.heads:
            whole = None
            with self._passing_over():
                whole = state.is_whole()
            if whole:
                yield state
            elif whole is False:
                self.weights.append(state)

    def _rank(self, state: SavedState) -> tuple[bool, int, bool, bool, float]:
        own, stopped = state.path.resolve() in self.own, state.path.name.startswith(STOPPED)
        return own, state.step, stopped, state.directory, state.written

    def _heads(self) -> list[SavedState]:
        heads: dict[Location, SavedState] = {}
        for place in self.places:
            for path in self._entries(place):
                if self.without is None or path.resolve() != self.without.resolve():
                    with self._passing_over():
                        heads.setdefault(path.resolve(), SavedState.of(path))
        return list(heads.values())

    def _entries(self, place: Place) -> list[Location]:
        try:
            entries = paths.entries(place.folder)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            self.damaged.append(f"{place.folder}: {error.strerror or error}")
            return []
        named = (entry for entry in entries if fnmatchcase(entry.name, place.names))
        return [entry for entry in named if _is_checkpoint(entry, place.suffix)]

    @contextmanager
    def _passing_over(self) -> Iterator[None]:
        """Remember what is damaged inside, and go on; what is gone by now is not even damaged."""
        try:
            yield
        except CorruptCheckpointError as error:
            self.damaged.append(str(error))
        except FileNotFoundError:
            pass


def _is_checkpoint(entry: Location, suffix: str) -> bool:
    """Whether an entry is, or by its name must be, a checkpoint; a complete version where its name is missing."""
    if entry.name.startswith("."):
        visible = paths.stands_for(entry)
        return visible is not None and not paths.is_taken(visible) and paths.has_manifest(entry)
    return entry.suffix == suffix or paths.has_manifest(entry)


def exactly(path: Location) -> Place:
    """The place that holds this path and no other."""
    return Place(path.parent, escape(path.name), path.suffix)


def latest(folder: str | os.PathLike[str], without: Location | None = None) -> Location | None:
    """The newest complete whole state in a folder; ``None``: there is none.

    Digests are not compared here; loading does.

    Args:
        folder: where to look; a path, or a URL of any ``fsspec`` file system.
        without: a path that is not wanted.
    """
    return next((state.path for state in Search([Place(at(folder))], without=without)), None)


def find(path: Location) -> Location:
    """What ``path`` stands for: itself, or the newest complete version if a save was cut off while replacing it.

    Raises:
        FileNotFoundError: there is neither; the newest complete whole state beside it is named.
    """
    if path.exists() or paths.has_manifest(path):  # web servers do not tell of directories
        return path
    versions = []
    for version in paths.versions(path):
        with suppress(CorruptCheckpointError):
            if not paths.is_partial(version):
                manifest = paths.manifest_of(version)
                versions.append((manifest.step, manifest.written, version))
    if versions:
        return max(versions)[2]
    link = f": it is a link to {os.readlink(path)}, where there is nothing" if paths.is_taken(path) else ""
    other = latest(path.parent)
    hint = f"; the newest complete whole state there is {other}" if other else ""
    raise UserFileError(f"Checkpoint file not found: there is no checkpoint {path}{link}{hint}")
