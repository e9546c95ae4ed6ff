"""What a ``torch.save`` file has at its top, told without loading a tensor and without running anything from it."""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection
from typing import Any, NamedTuple

from lightning_tex.saving.archive import stored_entry
from lightning_tex.saving.manifest import CorruptCheckpointError
from lightning_tex.saving.remote_path import Location

# What Lightning restores training from beside weights and progress. A directory has the optimizer states elsewhere.
_OF_A_RUN = frozenset({"global_step", "lr_schedulers"})
_OPTIMIZER_STATES = "optimizer_states"


class Contents(NamedTuple):
    """The top of a checkpoint: the names of its entries, and the optimizer steps done."""

    keys: frozenset[str]
    step: int


def holds_whole_state(keys: Collection[str], directory: bool) -> bool:
    """Whether a checkpoint with these entries holds all that training goes on from, or weights only.

    Args:
        keys: of the plain file, or of a directory's ``meta.pt``.
        directory: which of the two.
    """
    needed = _OF_A_RUN if directory else _OF_A_RUN | {_OPTIMIZER_STATES}
    return needed <= set(keys)


def contents(path: Location) -> Contents:
    """Read the top of a file that ``torch.save`` wrote: the archive's table and the structure, no elements.

    Raises:
        CorruptCheckpointError: it is no such file, or a cut one, whose table is missing.
    """
    try:
        with path.open("rb") as file:
            start, size = stored_entry(file, "/data.pkl")
            file.seek(start)
            top = _Structure(io.BytesIO(file.read(size))).load()
        if not isinstance(top, dict):
            raise TypeError(f"{type(top).__name__} at its top")
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever stands in a damaged file is taken for instructions
        raise CorruptCheckpointError(f"{path}: expected a checkpoint, found {type(error).__name__}: {error}") from error
    step = top.get("global_step")
    return Contents(frozenset(key for key in top if isinstance(key, str)), step if isinstance(step, int) else 0)


class _Inert(dict[Any, Any]):
    """Stands for every object of a file that is no plain data: it takes all that is done to it, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass


class _Structure(pickle.Unpickler):
    """Reads a pickle's structure: no name in it leads to a function or class, no storage is opened."""

    def find_class(self, module: str, name: str) -> type[_Inert]:
        return _Inert

    def persistent_load(self, pid: Any) -> _Inert:
        return _Inert()
