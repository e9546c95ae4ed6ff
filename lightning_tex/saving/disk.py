"""Folders that checkpoints will be written to are tried before training begins, by every rank that will write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning_tex.parallel.errors import UserRuntimeError
from lightning_tex.parallel.topology import Axis
from lightning_tex.saving.reading import all_problems
from lightning_tex.saving.remote_path import Location, at
from lightning_tex.saving.stores import store_of
from lightning_tex.saving.writing import Broadcast


def require_writable(folders: Sequence[Location], writes: bool, world: Axis, broadcast: Broadcast) -> None:
    """Try to write a file in each folder, which is made if need be; then all is as it was. Collective.

    What a process that was killed has left of its own try is removed.

    Args:
        folders: the same on all ranks.
        writes: whether this rank will write there.
        world: all ranks.
        broadcast: sends rank 0's object to all ranks.

    Raises:
        RuntimeError: on all ranks, naming every folder and rank that cannot, or does not see what rank 0 writes.
    """
    if not folders:
        return
    made: list[Location] = []
    marks: list[Location] = []
    problems: list[str] = []
    if world.rank == 0:
        problems = _failures(folders, world, lambda folder: made.extend(store_of(folder).make_folder(folder)))
    problems = broadcast(problems)
    if writes and not problems:
        problems = _failures(folders, world, lambda folder: marks.append(store_of(folder).put_mark(folder)))
    of_first = [at(mark) for mark in broadcast(list(map(str, marks)))]
    if writes and not problems:
        unseen = [mark.parent for mark in of_first if not mark.exists()]
        problems = [f"rank {world.rank} does not see what rank 0 writes to {folder}" for folder in unseen]
    problems = all_problems(problems, world)
    for mark in marks:
        store_of(mark).remove_mark(mark)
    for folder in reversed(made):
        store_of(folder).remove_folder(folder)
    if problems:
        raise UserRuntimeError(
            f"checkpoints cannot be saved: {'; '.join(problems)}. Legal: a folder that all ranks see and may write to "
            "(ModelCheckpoint(dirpath=..) or Trainer(default_root_dir=..)), or Trainer(enable_checkpointing=False)"
        )


def _failures(folders: Sequence[Location], world: Axis, act: Callable[[Location], Any]) -> list[str]:
    """What this rank cannot do in which folder."""
    problems = []
    for folder in folders:
        try:
            act(folder)
        except Exception as error:  # of any client of a file system
            said = error.strerror if isinstance(error, OSError) else None
            problems.append(f"rank {world.rank}: {folder}: {said or f'{type(error).__name__}: {error}'}")
    return problems
