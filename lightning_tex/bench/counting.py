"""Counting what a piece of work asks of the device: operations launched, waits of the host, bytes kept."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_tex.bench.memory import level_of_bytes

Result = TypeVar("Result")
_NO_KERNEL = (
    "aten::empty",
    "aten::new_empty",
    "aten::_unsafe_view",
    "aten::sym_",
    "aten::detach",
    "aten::_to_copy_meta",
)


class _Operations(TorchDispatchMode):
    """Counts operations of torch that do something, that is, no views and no allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
        self.count += not views and not func.name().startswith(_NO_KERNEL)
        return func(*args, **(kwargs or {}))


def launches(run: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """What ``run`` gives, and how many operations it launches.

    On CUDA: kernels, copies and fills that the profiler saw. Elsewhere: torch's operations that are no views.
    """
    if device.type != "cuda":
        with _Operations() as counted:
            return run(), counted.count
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        result = run()
        torch.cuda.synchronize(device)
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = record.profiler.kineto_results.events()
    return result, sum(event.device_type() == DeviceType.CUDA for event in events)


def synchronisations(run: Callable[[], Result], device: torch.device) -> tuple[Result, int | None]:
    """What ``run`` gives, and how often the host waits for the device in it; ``None`` for the CPU."""
    if device.type != "cuda":
        return run(), None
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return result, sum("synchronizing CUDA operation" in str(warning.message) for warning in told)


def kept_bytes(run: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """What ``run`` gives, and the bytes that are held on the device afterwards and were not before."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        result = run()
        return result, torch.cuda.memory_allocated(device) - before
    held: list[Result] = []
    _, level = level_of_bytes(lambda: held.append(run()))
    return held[0], level
