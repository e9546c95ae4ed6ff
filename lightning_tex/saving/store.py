"""The seam to where checkpoints lie: one class for each kind of store. Forms of checkpoints do not know which.

Whatever the store, a name stands for something whole or for nothing, and for the old until it stands for the new.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import ClassVar, Generic, TypeVar

from lightning_tex.saving.archive import NewFile

Place = TypeVar("Place")


class Store(ABC, Generic[Place]):
    """What is done with names where a checkpoint is written, replaced and removed."""

    part_bytes: ClassVar[int | None]
    """A rank writes its elements in files of at most so many bytes; ``None``: in one."""

    @abstractmethod
    def unfinished(self, path: Place) -> Place:
        """A new hidden name for the directory that is to become ``path``."""

    @abstractmethod
    def prepare(self, path: Place, unfinished: Place) -> None:
        """Let there be a directory to write in.

        Raises:
            OSError: ``path`` is something that cannot be replaced, or nothing can be made there.
        """

    @abstractmethod
    def new_file(self, path: Place, expected_bytes: int) -> NewFile:
        """A file to write in a directory that was prepared.

        Args:
            expected_bytes: how much is going to be written, about; for messages.
        """

    @abstractmethod
    def install(self, unfinished: Place, path: Place, linked: bool) -> None:
        """Let ``path`` stand for a directory that is complete now; then remove what it stood for.

        Args:
            linked: the name will be written again. One that exists is.
        """

    @abstractmethod
    def single_file(self, path: Place) -> AbstractContextManager[Place]:
        """Where to write a checkpoint of one file; it is at ``path``, in the place of what that stood for, at the end.

        If the block raises, nothing has changed.
        """

    @abstractmethod
    def link(self, target: Place, path: Place) -> None:
        """Let ``path`` lead to the checkpoint ``target``, and remove what it stood for alone."""

    @abstractmethod
    def remove(self, path: Place) -> None:
        """Remove a checkpoint or an unfinished one: its name, and what only that led to. Never seen in part."""

    # --- a folder that checkpoints will be written to

    @abstractmethod
    def make_folder(self, folder: Place) -> list[Place]:
        """The folders that had to be made for it to be there, outermost first; what was cut off in it is removed."""

    @abstractmethod
    def remove_folder(self, folder: Place) -> None:
        """Remove a folder that was made, if it is empty."""

    @abstractmethod
    def put_mark(self, folder: Place) -> Place:
        """Write a small file of a new name; whoever is told the name can look for it."""

    @abstractmethod
    def remove_mark(self, mark: Place) -> None:
        """Remove it, if it is there."""
