"""What a step allocates and computes, seen operation by operation."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_tex.parallel.replay import current_pass
from lightning_tex.planner_trace.flops import operation_flops
from lightning_tex.planner_trace.values import takes_memory, tensors_in

_FOREVER = 1 << 62


@dataclass
class Allocation:
    """One storage: its size, from which operation to which it lived, and what it was for."""

    size: int
    born: int
    kind: str | None
    died: int = _FOREVER


class Tracker(TorchDispatchMode):
    """Sees every storage that an operation makes, until nothing holds it any more; counts FLOPs between two moments.

    A storage's kind may be told at any time of its life. What nobody tells is ``other`` if it was there at
    :meth:`begin`, else ``activations``; what is born while :attr:`kind` is set is of that kind; what a collective reads
    or writes is a ``collective`` buffer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind: str | None = None
        self.counting = False
        self.flops: dict[str, int] = defaultdict(int)
        self._clock = 0
        self._window = (0, _FOREVER)
        self._all: list[Allocation] = []
        self._live: dict[int, Allocation] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # where a tensor lies, and the like
            return func(*args, **kwargs)
        given = tensors_in(args, kwargs.values())
        before = {_storage(t) for t in given}
        result = func(*args, **kwargs)
        self._clock += 1
        for tensor in tensors_in([result]):
            at = _storage(tensor)
            if at not in before and at not in self._live and takes_memory(tensor):
                self._hold(at, tensor.untyped_storage())
        if func.namespace == "c10d":
            self.tell(given, "collective")
        if self.counting and (flops := operation_flops(func, args, kwargs, result)):
            self.flops[current_pass()] += flops
        return result

    def _hold(self, at: int, storage: torch.UntypedStorage) -> None:
        allocation = Allocation(storage.nbytes(), self._clock, self.kind)
        self._all.append(allocation)
        self._live[at] = allocation
        # torch keeps a storage's Python object as long as any tensor has the storage.
        weakref.finalize(storage, self._release, at, allocation).atexit = False

    def _release(self, at: int, allocation: Allocation) -> None:
        allocation.died = self._clock
        if self._live.get(at) is allocation:
            del self._live[at]

    def tell(self, tensors: Iterable[Tensor], kind: str, anew: bool = False) -> None:
        """These tensors' storages are of this kind, unless they are of another already and not told ``anew``."""
        for tensor in tensors:
            allocation = self._live.get(_storage(tensor))
            if allocation is not None and (anew or allocation.kind is None):
                allocation.kind = kind

    def begin(self) -> None:
        """The step begins."""
        self._clock += 1
        self._all = [a for a in self._all if a.died == _FOREVER]
        for allocation in self._all:
            allocation.kind = allocation.kind or "other"
        self._window = (self._clock, _FOREVER)
        self.counting = True

    def end(self) -> None:
        """The step is over."""
        self._clock += 1
        self._window = (self._window[0], self._clock)
        self.counting = False

    def over_time(self) -> list[dict[str, int]]:
        """Live bytes by kind after each operation of the step at which they changed."""
        first, last = self._window
        changes: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for allocation in self._all:
            if allocation.born < last:
                kind = allocation.kind or "activations"
                changes[max(first, allocation.born)][kind] += allocation.size
                # What is let go of after an operation is gone when the next one allocates.
                if allocation.died < last:
                    changes[max(first, allocation.died + 1)][kind] -= allocation.size
        live: dict[str, int] = defaultdict(int)
        moments = []
        for _, change in sorted(changes.items()):
            for kind, size in change.items():
                live[kind] += size
            moments.append({kind: size for kind, size in live.items() if size})
        return moments


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
