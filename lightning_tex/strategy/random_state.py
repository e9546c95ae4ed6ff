"""Random numbers: alike over tensor, where activations are replicated; different over data."""

from __future__ import annotations

import random

import numpy as np
import torch

from lightning_tex.parallel import collectives
from lightning_tex.parallel.hashing import stable_hash
from lightning_tex.parallel.topology import Axis


def shared_seed(world: Axis, device: torch.device) -> int:
    """Rank 0's initial seed, on every rank; collective."""
    seed = torch.tensor([torch.initial_seed() & (2**62 - 1)], device=device)
    return int(collectives.broadcast(seed, world))


def data_rank_random_state(seed: int, data: Axis) -> None:
    """Seed torch, NumPy and Python by (seed, data rank)."""
    own = stable_hash(seed, "data", data.rank)
    torch.manual_seed(own)
    np.random.seed(own % 2**32)  # noqa: NPY002  # user code draws from the global state
    random.seed(own)
