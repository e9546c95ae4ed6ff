"""A copy of a module that takes no memory, and a place to try it in that leaves nothing behind."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_tex.parallel.sharding import TexModule, tex_modules


@contextmanager
def undisturbed() -> Iterator[None]:
    """Where random numbers, the default dtype and warnings are as before when one leaves."""
    dtype = torch.get_default_dtype()
    try:
        with isolate_rng(), warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(dtype)


def without_values(module: LightningModule) -> LightningModule:
    """A copy of a module at its full size, in training, whose floating-point parameters and buffers are fake.

    To be made where these have no contents (:class:`~lightning_tex.planner.fake_values.ShapesOnly`).
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        full = part.full_shapes if isinstance(part, TexModule) else {}
        for name, parameter in part.named_parameters(recurse=False):
            made = torch.empty(full.get(name, parameter.shape), dtype=parameter.dtype)
            memo.setdefault(id(parameter), nn.Parameter(made, parameter.requires_grad))
        for buffer in part.buffers(recurse=False):
            values = not buffer.is_floating_point() and not buffer.is_meta
            memo.setdefault(
                id(buffer), buffer.cpu().clone() if values else torch.zeros(buffer.shape, dtype=buffer.dtype)
            )
    copied = copy.deepcopy(module, memo)
    for _, layer in tex_modules(copied):
        layer.bound, layer.full_shapes = None, {}
    for part in copied.modules():
        if isinstance(part, LightningModule):
            part._device = torch.device("cpu")
    return copied.train()
