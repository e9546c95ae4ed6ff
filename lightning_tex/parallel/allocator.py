"""How memory is handed out: CUDA's in segments that grow, and the host's from what earlier steps have freed."""

from __future__ import annotations

import ctypes
import os
from collections.abc import MutableMapping

import torch

_SETTING = "expandable_segments:True"
# What torch reads, and what it read before 2.9 and still does.
_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# torch 2.13 deprecates the second.
_SET = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings
# glibc's mallopt: memory at the heap's end that goes back to the system, and the size from which on memory is mapped by
# itself, which goes back whenever it is freed.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _KEPT_BYTES = -1, -3, 1 << 30
_OLDER_LIMIT = 32 << 20  # what glibc took at most before 2.35
_HOST_NAMES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Let this process keep up to 1 GiB of the host's memory that it has freed; what the user has set stays.

    What a step on CPU frees the next one takes again. If it goes back to the system in between, each page of it is
    mapped and cleared anew: for that a small model takes some percent of its processor time. To be called when weights
    have been loaded, which takes memory once.

    Returns:
        whether it is kept: not without glibc, nor with another allocator.
    """
    if any(name in environment for name in _HOST_NAMES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    taken = mallopt(_MMAP_THRESHOLD, _KEPT_BYTES) or mallopt(_MMAP_THRESHOLD, _OLDER_LIMIT)
    return bool(taken and mallopt(_TRIM_THRESHOLD, _KEPT_BYTES))


def use_growing_segments(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Ask for segments that grow, before the first tensor is on a GPU; what the user has set stays.

    In a dropless layer, and with packed or padded batches, the number of rows is another in every step.

    Returns:
        whether they were asked for.
    """
    if any(name in environment for name in _NAMES):
        return False
    environment[_NAMES[0]] = _SETTING  # for processes that this one starts
    if torch.cuda.is_available():  # torch may have read it already
        _SET(_SETTING)
    return True
