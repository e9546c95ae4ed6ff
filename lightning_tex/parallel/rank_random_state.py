"""Random numbers that differ over an axis, inside a region that is sharded over it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightning_tex.parallel.hashing import stable_hash
from lightning_tex.parallel.topology import Axis


@contextmanager
def rank_random_state(axis: Axis, enabled: bool = True) -> Iterator[None]:
    """Random numbers that differ over an axis, inside a region sharded over it; outside, the state moves on alike."""
    if not enabled or axis.size == 1:
        yield
        return
    seed = stable_hash(int(torch.randint(2**62, ())), axis.rank)
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
