"""Weights with what adapters add to them, put together when they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_tex.lora.apply import Adapted, adapted, adapter_names
from lightning_tex.optim.formats import MASTER
from lightning_tex.parallel.extent import Extent
from lightning_tex.parallel.topology import Topology
from lightning_tex.saving.global_tensor import GlobalTensor, Part
from lightning_tex.saving.model_state import MODEL, OPTIMIZER, Described, Source, TensorPath, model_state

# Matrices of one layer's experts that files may hold in turn.
_KEPT = 3


def merged_state(module: nn.Module, topology: Topology) -> dict[str, GlobalTensor]:
    """The state of a model as it would be without adapters, had their matrices been trained instead.

    An adapted matrix is in fp32 at least; a rank merges the part that it holds, when it is read, and keeps the last
    few.
    """
    state = model_state(module, topology)
    merges = {one.weight: one.adapter.merged for one in adapted(module)}

    @lru_cache(_KEPT)
    def merged(name: str) -> Tensor:
        (part,) = state[name].parts
        return merges[name](part.read())

    factors = adapter_names(module)
    result = {name: tensor for name, tensor in state.items() if name not in factors}
    for name in merges:
        plain = result[name]
        wide = torch.promote_types(plain.dtype, torch.float32)
        parts = [Part(part.extent, _reader(merged, name)) for part in plain.parts]
        result[name] = GlobalTensor(plain.shape, wide, parts, plain.writes)
    return result


def _reader(merged: Callable[[str], Tensor], name: str) -> Callable[[], Tensor]:
    return lambda: merged(name)


class _Weight(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype


class MergedWeights:
    """Weights of a checkpoint or folder with what a checkpoint's adapters add; a ``Source``.

    Args:
        base: has the matrices.
        adapters: has the adapters: their masters, where there are some, which are read whole. What else it has, as it
            was trained beside them, goes before the base's.
        model: on the meta device, with adapters; says which belong to what.
        prefix: that names in both have before the model's.
    """

    def __init__(self, base: Source, adapters: Source, model: nn.Module, prefix: str) -> None:
        self._base, self._adapters, self._prefix = base, adapters, prefix
        self._adapted: dict[TensorPath, Adapted] = {(MODEL, prefix + one.weight): one for one in adapted(model)}
        self.saved: Mapping[TensorPath, Described] = {
            path: _Weight(tuple(known.shape), torch.promote_types(known.dtype, torch.float32))
            if path in self._adapted
            else known
            for path, known in {**base.saved, **self._trained(base)}.items()
        }

    def fill(self, request: Mapping[TensorPath, GlobalTensor]) -> None:
        """Read, and add what is to be added."""
        trained = self._trained(self._base)
        for source, wants in ((self._base, lambda path: path not in trained), (self._adapters, trained.__contains__)):
            source.fill({path: wanted for path, wanted in request.items() if wants(path)})
        for path, wanted in request.items():
            if path in self._adapted:
                for part in wanted.parts:
                    self._add(self._adapted[path], part)

    def _trained(self, base: Source) -> dict[TensorPath, Described]:
        return {path: known for path, known in self._adapters.saved.items() if path in base.saved}

    def _add(self, one: Adapted, part: Part) -> None:
        *stacked, rows, columns = part.extent.slices
        a, b = (self._factor(f"{self._prefix}{one.prefix}.{factor}") for factor in ("a", "b"))
        memory = part.read()
        added = b[(*stacked, rows)].to(memory.dtype) @ a[(*stacked, slice(None), columns)].to(memory.dtype)
        memory.add_(added, alpha=one.adapter.scale)

    def _factor(self, name: str) -> Tensor:
        path: TensorPath = (MODEL, name)
        if (OPTIMIZER, "state", name, MASTER) in self._adapters.saved:
            path = (OPTIMIZER, "state", name, MASTER)
        known = self._adapters.saved[path]
        memory = torch.empty(tuple(known.shape), dtype=known.dtype)
        part = Part(Extent.whole(tuple(known.shape)), lambda: memory)
        self._adapters.fill({path: GlobalTensor(tuple(known.shape), memory.dtype, [part])})
        return memory
