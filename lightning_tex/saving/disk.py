"""Room to write in: errors that say how much was missing where, and folders that are tried before training begins."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lightning_tex.parallel.errors import UserRuntimeError
from lightning_tex.parallel.topology import Axis
from lightning_tex.saving import paths
from lightning_tex.saving.reading import all_problems
from lightning_tex.saving.writing import Broadcast

# What is tried to be written.
_PROBE = "probe"


def require_writable(folders: Sequence[Path], writes: bool, world: Axis, broadcast: Broadcast) -> None:
    """Try to write a file in each folder, which is made if need be; then all is as it was. Collective.

    What a process that was killed has left of its own try is removed.

    Args:
        folders: the same on all ranks.
        writes: whether this rank will write there.
        world: all ranks.
        broadcast: sends rank 0's object to all ranks.

    Raises:
        RuntimeError: on all ranks, naming every folder and rank that cannot.
    """
    if not folders:
        return
    problems: list[str] = []
    made: list[Path] = []
    if world.rank == 0:
        for folder in folders:
            made += _made(folder, problems)
            paths.remove_leftovers(folder / _PROBE)
    problems = broadcast(problems)
    if writes and not problems:
        problems = [f"rank {world.rank}: {text}" for text in map(_failure, folders) if text]
    problems = all_problems(problems, world)
    for folder in reversed(made):
        with suppress(OSError):
            folder.rmdir()
    if problems:
        raise UserRuntimeError(
            f"checkpoints cannot be saved: {'; '.join(problems)}. Legal: a folder that all ranks see and may write to "
            "(ModelCheckpoint(dirpath=..) or Trainer(default_root_dir=..)), or Trainer(enable_checkpointing=False)"
        )


def _made(folder: Path, problems: list[str]) -> list[Path]:
    """The folders that had to be made, outermost first."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()][::-1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problems.append(f"rank 0: {folder}: {error.strerror}")
    return [place for place in missing if place.is_dir()]


def _failure(folder: Path) -> str | None:
    probe = paths.partial_name(folder / _PROBE)
    try:
        probe.write_bytes(b"?")
        probe.unlink(missing_ok=True)
    except OSError as error:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
        return f"{folder}: {error.strerror}"
    return None
