"""Floor 2: recomputation of activations."""

from __future__ import annotations

import torch


def recomputing() -> bool:
    """Whether the current forward runs inside a backward, that is, repeats one that ran before."""
    return torch._C._current_graph_task_id() != -1
