"""A checkpoint directory as one plain checkpoint, for one process: torch's and Lightning's own form."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning import LightningModule
from torch import Tensor

from lightning_tex.optim.formats import MASTER
from lightning_tex.saving import places
from lightning_tex.saving.checkpoint import OWN, TIES
from lightning_tex.saving.manifest import CorruptCheckpointError
from lightning_tex.saving.reading import Directory
from lightning_tex.saving.state import MODEL, OPTIMIZER

_Module = TypeVar("_Module", bound=LightningModule)


def consolidated(path: str | os.PathLike[str], weights_only: bool = False) -> dict[str, Any]:
    """A checkpoint directory in the form of one plain Lightning checkpoint, whole in host memory.

    Where 16-bit parameters have fp32 masters, ``state_dict`` holds these. ``strategy="auto"`` resumes from it.

    Args:
        path: the directory, or a link to it.
        weights_only: without optimizer states.

    Raises:
        FileNotFoundError: there is none.
        CorruptCheckpointError: a file is not what was written; all files are checked first.
    """
    directory = Directory.verified(places.find(Path(path)))
    rest = directory.rest()
    own = rest.pop(OWN, {})
    tensors = dict(directory.whole(lambda name: name[0] == MODEL or name[-1] == MASTER or not weights_only))
    masters = {name[2]: value for name, value in tensors.items() if name[0] == OPTIMIZER and name[-1] == MASTER}
    ties = own.get(TIES, {})
    weights = {}
    for (kind, *name), value in tensors.items():
        if kind == MODEL:
            weights[name[0]] = masters.get(ties.get(name[0], name[0]), value)
    checkpoint = {**rest, "state_dict": weights}
    if "optimizer" in own and not weights_only:
        checkpoint["optimizer_states"] = [_optimizer_state(own["optimizer"], tensors)]
    return checkpoint


def _optimizer_state(saved: Mapping[str, Any], tensors: Mapping[tuple[str, ...], Tensor]) -> dict[str, Any]:
    groups = saved["param_groups"]
    numbers = {name: index for index, name in enumerate(name for group in groups for name in group["params"])}
    state: dict[int, dict[str, Any]] = {}
    for path, value in tensors.items():
        if path[0] == OPTIMIZER and path[-1] != MASTER:
            plain = value.item() if path[3] in saved["numbers"] else value
            state.setdefault(numbers[path[2]], {})[path[3]] = plain
    plain_groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups]
    return {"state": dict(sorted(state.items())), "param_groups": plain_groups, "dice": saved.get("dice")}


def consolidate(path: str | os.PathLike[str], output: str | os.PathLike[str], weights_only: bool = False) -> None:
    """Write :func:`consolidated` to a file that ``torch.load(.., weights_only=True)`` reads.

    Raises:
        FileExistsError: ``output`` exists.
    """
    target = Path(output)
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists; nothing is written over it")
    checkpoint = consolidated(path, weights_only)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = places.partial_name(target)
    try:
        torch.save(checkpoint, partial)
        places.replace_by_file(partial, target)
    finally:
        places.remove(partial)


def load_from_checkpoint(module: type[_Module], path: str | os.PathLike[str], **arguments: Any) -> _Module:
    """``module.load_from_checkpoint(path, ..)`` for directories as well as files.

    Args:
        module: the LightningModule's class.
        path: a checkpoint directory or a plain file.
        arguments: as of Lightning's ``load_from_checkpoint``.

    Raises:
        FileNotFoundError: there is none.
        CorruptCheckpointError: a file of it is not what was written.
    """
    arguments.setdefault("weights_only", True)  # said explicitly, an environment variable cannot turn it off
    found = places.find(Path(path))
    if not found.is_dir():
        return module.load_from_checkpoint(found, **arguments)
    buffer = io.BytesIO()
    torch.save(consolidated(found, weights_only=True), buffer)
    buffer.seek(0)
    return module.load_from_checkpoint(buffer, **arguments)


def checkpoints_in(folder: Path) -> list[tuple[Path, str | None]]:
    """What lies in a folder that is, or was to become, a checkpoint directory; and what an incomplete one lacks."""
    found: list[tuple[Path, str | None]] = []
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            try:
                places.manifest_of(entry)
                found.append((entry, None))
            except CorruptCheckpointError as error:
                found.append((entry, str(error)))
    return found
