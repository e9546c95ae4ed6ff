"""Moving rows by index: gathers and sums of gathers, no atomics, so that runs repeat."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_tex.parallel.compiled import leaf
from lightning_tex.parallel.device import device_type

# n rows in, m rows out, D width, T tokens, k choices per token, E experts


def pick(x: Tensor, index: Tensor, gaps: bool = True) -> Tensor:
    """Row ``index[i]`` of ``x`` as row i; zeros where ``index[i]`` is n. [n, ..], [m] -> [m, ..]. No autograd.

    Args:
        gaps: whether n may occur.
    """
    if not gaps:
        return x.index_select(0, index)
    if not len(x):
        return x.new_zeros(len(index), *x.shape[1:])
    if device_type(x) == "cpu":
        return x.index_select(0, index.clamp(max=len(x) - 1)).index_fill_(0, (index == len(x)).nonzero()[:, 0], 0)
    return _pick_or_zero(x, index)


@leaf
def _pick_or_zero(x: Tensor, index: Tensor) -> Tensor:
    there = (index < x.shape[0]).view(-1, *[1] * (x.dim() - 1))
    return torch.where(there, x[index.clamp(max=x.shape[0] - 1)], 0)


def sum_picked(x: Tensor, index: Tensor, gaps: bool = True) -> Tensor:
    """The sum of the rows ``x[index[i]]`` as row i, in fp32: [n, D], [T, k] -> [T, D]. n stands for zeros. No autograd.

    The transpose of picking each token's row for each of its choices.

    Args:
        gaps: whether n may occur.
    """
    tokens, top_k = index.shape
    if not len(x) or not tokens:
        return x.new_zeros(tokens, x.shape[1])
    if top_k == 1:
        return pick(x, index[:, 0], gaps)
    if not gaps:
        return _sum_picked(x, index)
    if device_type(x) == "cpu":
        # Bags of what there is: an index that stands for nothing takes several times as long.
        there = index < len(x)
        bags = there.sum(1).cumsum(0).roll(1)
        bags[0] = 0
        return F.embedding_bag(index[there], x, bags, mode="sum")
    return _sum_picked_or_zero(x, index)


@leaf
def _sum_picked(x: Tensor, index: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        return F.embedding_bag(index, x, mode="sum")  # one kernel, but for it no others can be fused
    total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for place in index.unbind(1):
        total = total + x[place]
    return total.to(x.dtype)


@leaf
def _sum_picked_or_zero(x: Tensor, index: Tensor) -> Tensor:
    total = torch.zeros(
        (index.shape[0], x.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device
    )
    for place in index.unbind(1):
        total += torch.where((place < x.shape[0])[:, None], x[place.clamp(max=x.shape[0] - 1)], 0)
    return total.to(x.dtype)


class Order(NamedTuple):
    """Choices grouped by expert, in their given order within each expert.

    sorted:   [n] choice at each place.
    experts:  [n] expert at each place, a small integer.
    starts:   [E + 1] first place of each expert; the last entry is the number of choices that fell on an expert.
    """

    sorted: Tensor
    experts: Tensor
    starts: Tensor


def group_by_expert(choices: Tensor, num_experts: int) -> Order:  # [n] in 0..E
    """Stable grouping of choices; those equal to E (masked) come last, outside every group."""
    # Sorting takes time by the bytes of what is sorted.
    small = next((d for d in (torch.uint8, torch.int16) if num_experts <= torch.iinfo(d).max), choices.dtype)
    experts, order = choices.to(small).sort(stable=True)
    bounds = torch.arange(num_experts + 1, device=choices.device, dtype=small)
    return Order(order, experts, torch.searchsorted(experts, bounds))


def invert(permutation: Tensor) -> Tensor:  # [n] -> [n]
    """The inverse of a permutation."""
    places = torch.arange(len(permutation), device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, places)
