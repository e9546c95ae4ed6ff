"""What a step allocates and computes, seen operation by operation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_tex.parallel.allocations import AllocationWatch, storage_key, tensors_in
from lightning_tex.parallel.replay import current_pass
from lightning_tex.planner_trace.flops import operation_flops
from lightning_tex.planner_trace.values import takes_memory

_FOREVER = 1 << 62


@dataclass
class Allocation:
    """One storage: its size, from which operation to which it lived, and what it was for."""

    size: int
    born: int
    kind: str | None
    died: int = _FOREVER


class Tracker(AllocationWatch[Allocation]):
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
        self._window = (0, _FOREVER)
        self._all: list[Allocation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # where a tensor lies, and the like
            return func(*args, **kwargs)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace == "c10d":
            self.tell(tensors_in(args, kwargs.values()), "collective")
        if self.counting and (flops := operation_flops(func, args, kwargs, result)):
            self.flops[current_pass()] += flops
        return result

    def counts(self, tensor: Tensor) -> bool:
        return takes_memory(tensor)

    def allocated(self, size: int) -> Allocation:
        allocation = Allocation(size, self.clock, self.kind)
        self._all.append(allocation)
        return allocation

    def freed(self, allocation: Allocation) -> None:
        allocation.died = self.clock

    def tell(self, tensors: Iterable[Tensor], kind: str, anew: bool = False) -> None:
        """These tensors' storages are of this kind, unless they are of another already and not told ``anew``."""
        for tensor in tensors:
            allocation = self.live.get(storage_key(tensor))
            if allocation is not None and (anew or allocation.kind is None):
                allocation.kind = kind

    def begin(self) -> None:
        """The step begins."""
        self.clock += 1
        self._all = [a for a in self._all if a.died == _FOREVER]
        for allocation in self._all:
            allocation.kind = allocation.kind or "other"
        self._window = (self.clock, _FOREVER)
        self.counting = True

    def end(self) -> None:
        """The step is over."""
        self.clock += 1
        self._window = (self._window[0], self.clock)
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
