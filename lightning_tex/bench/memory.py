"""Counting bytes: what a call holds at once, temporaries inside torch's kernels included, and what is alive."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from time import sleep

import torch
from torch import Tensor
from torch.autograd.profiler import profile

from lightning_tex.parallel.allocations import storage_bytes


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Highest number of bytes that ``run`` holds at once on ``device``, above what was there before.

    On CUDA by the allocator's statistics. On CPU by the profiler's record of every allocation of the calling thread,
    which misses what libraries other than torch allocate and, erring upwards, what other threads free (gloo's do).

    Args:
        run: what is measured; slower than usual on CPU, so not to be timed meanwhile.
        device: whose memory is counted.
    """
    gc.collect()  # garbage of earlier calls, freed inside, would hide as much of this one's
    return _peak_on_cuda(run, device) if device.type == "cuda" else level_of_bytes(run)[0]


def live_bytes(device: torch.device) -> int:
    """Bytes of all tensors alive on ``device``, each storage once."""
    gc.collect()
    tensors = [held for held in gc.get_objects() if issubclass(type(held), Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return storage_bytes(tensor for tensor in tensors if tensor.device == device)


def settled_bytes(device: torch.device) -> int:
    """:func:`live_bytes` of a process whose collectives have ended: of their tensors too.

    Threads of gloo let go of a collective's tensors a moment after its result is there, and for those that Python
    knows they need Python's lock, which is free in the pauses here.
    """
    least, looks_alike = live_bytes(device), 0
    while looks_alike < 5:
        sleep(2e-3)
        alive = live_bytes(device)
        looks_alike = looks_alike + 1 if alive == least else 0
        least = min(least, alive)
    return least


def _peak_on_cuda(run: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - start


def level_of_bytes(run: Callable[[], object]) -> tuple[int, int]:
    """The most bytes that ``run`` holds at once on CPU, and those that it leaves, both above what was there before.

    As :func:`peak_bytes` counts them.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells stderr of every start and stop
    with profile(profile_memory=True) as record:
        run()
    level = peak = 0
    assert record.kineto_results is not None
    for event in record.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            level += event.nbytes()
            peak = max(peak, level)
    return peak, level
