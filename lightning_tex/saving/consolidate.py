"""A checkpoint directory as one plain checkpoint, for one process: torch's and Lightning's own form."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lightning_tex.optim.formats import MASTER
from lightning_tex.saving import paths, plain_form
from lightning_tex.saving.checkpoint_format import OWN_ENTRY
from lightning_tex.saving.further_weights import put_whole
from lightning_tex.saving.manifest import CorruptCheckpointError
from lightning_tex.saving.model_state import MODEL, OPTIMIZER, TIES, TensorPath
from lightning_tex.saving.newest import find
from lightning_tex.saving.optimizer_loading import OptimizerStates
from lightning_tex.saving.optimizer_state import GROUPS_OF_EACH, ROOTS
from lightning_tex.saving.reading import Directory
from lightning_tex.saving.remote_path import Location, at
from lightning_tex.saving.stores import store_of
from lightning_tex.saving.whole_tensors import tensor_bytes


def consolidated(path: str | os.PathLike[str], weights_only: bool = False, trusted: bool = False) -> dict[str, Any]:
    """A checkpoint directory in the form of one plain Lightning checkpoint, whole in host memory.

    Where 16-bit parameters have fp32 masters, ``state_dict`` holds these. ``strategy="auto"`` resumes from it.

    Args:
        path: the directory, or a link to it; a path or a URL.
        weights_only: without optimizer states.
        trusted: make objects of any type that hyperparameters and states of callbacks have, as
            ``torch.load(weights_only=False)`` does, which runs code from the checkpoint.

    Raises:
        FileNotFoundError: there is none.
        CorruptCheckpointError: a file is not what was written; all files are checked first.
        ValueError: it holds such an object, and is not trusted.
    """
    directory = Directory.verified(find(at(path)))
    trainer_state = directory.trainer_state(False if trusted else None)
    own = trainer_state.pop(OWN_ENTRY)
    tensors = dict(directory.whole(lambda name: name[0] == MODEL or name[-1] == MASTER or not weights_only))
    masters = {name[2]: value for name, value in tensors.items() if name[0] == OPTIMIZER and name[-1] == MASTER}
    weights = {
        path[1]: masters.get(own[TIES].get(path[1], path[1]), value)
        for path, value in tensors.items()
        if path[0] == MODEL
    }
    checkpoint = {**trainer_state, "state_dict": weights}
    put_whole(checkpoint, tensors, own)
    about = own.get("optimizer")  # a save of the weights alone has none
    if about is None or weights_only:
        return plain_form.versioned(checkpoint, None)
    states = OptimizerStates.by_name(about, directory)
    remaining = iter(states.groups)
    counts = about.get(GROUPS_OF_EACH, [len(states.groups)])
    checkpoint["optimizer_states"] = [
        plain_form.torch_form(_states_by_name(tensors, root, states.number_keys), list(islice(remaining, count)))
        for root, count in zip(about.get(ROOTS, [OPTIMIZER] * len(counts)), counts, strict=True)
    ]
    return plain_form.versioned(checkpoint, states.rounding_seed)


def _states_by_name(
    tensors: Mapping[TensorPath, Tensor], root: str, number_keys: frozenset[str]
) -> dict[str, dict[str, Tensor | float]]:
    states: dict[str, dict[str, Tensor | float]] = {}
    for path, value in tensors.items():
        if path[0] == root and path[-1] != MASTER:
            states.setdefault(path[2], {})[path[3]] = value.item() if path[3] in number_keys else value
    return states


def consolidate(path: str | os.PathLike[str], output: str | os.PathLike[str], weights_only: bool = False) -> None:
    """Write :func:`consolidated` to a file that ``torch.load(.., weights_only=True)`` reads.

    Raises:
        FileExistsError: ``output`` exists.
    """
    target = at(output)
    if paths.is_taken(target):
        raise FileExistsError(f"{target} exists; nothing is written over it")
    checkpoint = consolidated(path, weights_only)
    store = store_of(target)
    with store.single_file(target) as place, store.new_file(place, tensor_bytes(checkpoint)) as file:
        torch.save(checkpoint, file)  # type: ignore[arg-type]
        file.finish()


def default_output(path: Location, weights_only: bool) -> Location:
    """A name beside ``path`` that says what it is; Lightning takes every name that begins with *last* for the last."""
    return path.with_name(f"{'weights' if weights_only else 'whole'}-of-{path.name.removesuffix('.ckpt')}.ckpt")


def checkpoints_in(folder: Location) -> list[tuple[Location, str | None]]:
    """What lies in a folder that is, or was to become, a checkpoint directory; and what an incomplete one lacks."""
    found: list[tuple[Location, str | None]] = []
    for entry in paths.entries(folder):
        if paths.is_directory(entry) and not entry.name.startswith("."):
            try:
                paths.manifest_of(entry)
                found.append((entry, None))
            except CorruptCheckpointError as error:
                found.append((entry, str(error)))
    return found
