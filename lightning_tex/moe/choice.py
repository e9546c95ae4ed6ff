"""The largest of a token's preferences, and of equal ones the first: the same choices everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_tex.parallel.compiled import leaf

# T rows, E columns to choose from, k choices


def largest(preferences: Tensor, k: int) -> Tensor:  # [T, E] -> [T, k] int64
    """Columns of each row's k largest values, the largest first; of equal ones the lowest column first.

    NaN counts as larger than all. ``torch.topk`` leaves the order of equal values open.
    """
    if k == 1:
        return preferences.argmax(-1, keepdim=True)
    if preferences.dtype == torch.float64:
        return preferences.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
    return _distinct(preferences).topk(k, dim=-1).indices


@leaf
def _distinct(preferences: Tensor) -> Tensor:
    """Integers in the same order, of which those of equal values fall with the column."""
    # As integers, bits of positive floats are in their order, those of negative ones in the reverse, from -0 on.
    bits = preferences.to(torch.float32).view(torch.int32)
    ordered = torch.where(bits < 0, torch.iinfo(torch.int32).min - bits, bits)
    below = torch.arange(0, -preferences.shape[1], -1, device=preferences.device)
    return torch.add(below, ordered, alpha=1 << 31)
