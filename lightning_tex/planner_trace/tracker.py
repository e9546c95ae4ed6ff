"""What a step allocates, sends through collectives and computes, seen operation by operation."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from lightning_tex.parallel.allocations import tensors_in
from lightning_tex.parallel.replay import current_pass
from lightning_tex.planner.allocation_timeline import AllocationTimeline
from lightning_tex.planner_trace.flops import operation_flops


class Tracker(AllocationTimeline):
    """A timeline that knows the buffers of collectives, and counts FLOPs between two moments.

    What a collective reads or writes and nobody tells otherwise is a ``collective`` buffer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counting = False
        self.flops: dict[str, int] = defaultdict(int)

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

    def begin(self) -> None:
        super().begin()
        self.counting = True

    def end(self) -> None:
        super().end()
        self.counting = False
