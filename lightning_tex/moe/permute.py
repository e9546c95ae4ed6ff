"""Moving rows by index: gathers in both directions, no atomics, so that runs repeat."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# n rows in, m rows out, D width


def pick(x: Tensor, index: Tensor) -> Tensor:
    """Row ``index[i]`` of ``x`` as row i; zeros where ``index[i]`` is n. [n, D], [m] -> [m, D]. No autograd."""
    # Filling rows by a mask afterwards takes several times as long as a row of zeros to pick from.
    return torch.cat([x, x.new_zeros(1, x.shape[1])]).index_select(0, index)


class Order(NamedTuple):
    """Choices grouped by expert, in their given order within each expert.

    sorted:   [n] choice at each place.
    experts:  [n] expert at each place.
    starts:   [E + 1] first place of each expert; the last entry is the number of choices that fell on an expert.
    """

    sorted: Tensor
    experts: Tensor
    starts: Tensor


def group_by_expert(choices: Tensor, num_experts: int) -> Order:  # [n] in 0..E
    """Stable grouping of choices; those equal to E (masked) come last, outside every group."""
    experts, order = choices.sort(stable=True)
    bounds = torch.arange(num_experts + 1, device=choices.device, dtype=experts.dtype)
    return Order(order, experts, torch.searchsorted(experts, bounds))


def invert(permutation: Tensor) -> Tensor:  # [n] -> [n]
    """The inverse of a permutation."""
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), device=permutation.device)
    return inverse
