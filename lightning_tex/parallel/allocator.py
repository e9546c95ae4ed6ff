"""How CUDA's memory is handed out: in segments that grow, so that sizes which differ in every step leave no holes."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

import torch

_SETTING = "expandable_segments:True"
# What torch reads, and what it read before 2.9 and still does.
_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# torch 2.13 deprecates the second.
_SET = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings


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
