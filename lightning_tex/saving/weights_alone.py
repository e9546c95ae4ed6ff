"""A checkpoint directory of weights alone, written by one process, for runs that begin with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.topology import Axis
from lightning_tex.saving.checkpoint_format import OWN_ENTRY
from lightning_tex.saving.global_tensor import GlobalTensor
from lightning_tex.saving.model_state import MODEL, TIES
from lightning_tex.saving.side_group import SideGroup
from lightning_tex.saving.writing import begin


def write_weights(path: Path, tensors: Mapping[str, GlobalTensor], trainer_state: Mapping[str, Any]) -> None:
    """Write a directory of weights alone, in one process: each part is read when it is written.

    Args:
        path: of the directory.
        tensors: the model's, by name; their parts give contiguous elements in host memory.
        trainer_state: everything else, without what training goes on from.
    """
    world, layout = Axis("world"), Layout(1)
    state = {**trainer_state, OWN_ENTRY: {"layout": asdict(layout), TIES: {}}}
    save = begin(path, False, {}, state, layout, world, lambda obj: obj)
    save.tensors = {(MODEL, name): tensor for name, tensor in tensors.items()}
    save.finish(SideGroup(world, timedelta(0)))
