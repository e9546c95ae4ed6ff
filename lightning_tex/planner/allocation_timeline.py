"""Which storages lived from which operation to which, and what they were for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_tex.parallel.allocations import AllocationWatch, storage_key
from lightning_tex.planner.fake_values import takes_memory

_FOREVER = 1 << 62


@dataclass
class Allocation:
    """One storage: its size, from which operation to which it lived, and what it was for."""

    size: int
    born: int
    kind: str | None
    died: int = _FOREVER


class AllocationTimeline(AllocationWatch[Allocation]):
    """Sees every storage that an operation makes, until nothing holds it any more.

    A storage's kind may be told at any time of its life. What nobody tells is ``other`` if it was there at
    :meth:`begin`, else ``activations``; what is born while :attr:`kind` is set is of that kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind: str | None = None
        self._window = (0, _FOREVER)
        self._all: list[Allocation] = []

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

    def tell_rest(self, kind: str) -> None:
        """What lives now and is of no kind yet is of this one."""
        for allocation in self.live.values():
            allocation.kind = allocation.kind or kind

    @property
    def operation(self) -> int:
        """Operations since the step began."""
        return self.clock - self._window[0]

    def begin(self) -> None:
        """The step begins."""
        self.clock += 1
        self._all = [a for a in self._all if a.died == _FOREVER]
        self.tell_rest("other")
        self._window = (self.clock, _FOREVER)

    def end(self) -> None:
        """The step is over."""
        self.clock += 1
        self._window = (self._window[0], self.clock)

    def changes(self) -> Mapping[int, Mapping[str, int]]:
        """By operation of the step, counted from its begin, how many bytes of each kind came, or went before it."""
        first, last = self._window
        changes: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for allocation in self._all:
            if allocation.born < last:
                kind = allocation.kind or "activations"
                changes[max(0, allocation.born - first)][kind] += allocation.size
                # What is let go of after an operation is gone when the next one allocates.
                if allocation.died < last:
                    changes[max(0, allocation.died + 1 - first)][kind] -= allocation.size
        return changes

    def over_time(self) -> list[dict[str, int]]:
        """Live bytes by kind after each operation of the step at which they changed."""
        live: dict[str, int] = defaultdict(int)
        moments = []
        for _, change in sorted(self.changes().items()):
            for kind, size in change.items():
                live[kind] += size
            moments.append({kind: size for kind, size in live.items() if size})
        return moments
