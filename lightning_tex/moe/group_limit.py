"""Experts in groups, of which a token may use those of a few only (DeepSeek-V2, arXiv 2405.04434, section 2.1.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_tex.moe.choice import largest
from lightning_tex.parallel.errors import UserValueError

# T tokens, E experts, G groups

# What a group is chosen by: its best expert (DeepSeek-V2), or its best two (DeepSeek-V3).
GroupScore = Literal["max", "top2_sum"]


@dataclass(frozen=True)
class GroupLimit:
    """Experts 0 to E/G - 1 are a group, the next E/G another: choices fall into the best few groups.

    Args:
        n_group: G; divides E.
        topk_group: groups that a token may use.
        group_score: what a group is chosen by.
    """

    n_group: int
    topk_group: int
    group_score: GroupScore = "max"

    def require(self, num_experts: int, top_k: int) -> None:
        """Raise ``ValueError`` unless there are such groups, with enough experts for ``top_k`` choices."""
        if num_experts % self.n_group:
            legal = ", ".join(str(n) for n in range(1, num_experts + 1) if num_experts % n == 0)
            raise UserValueError(f"n_group={self.n_group} does not divide num_experts={num_experts}; legal: {legal}")
        if self.group_score not in get_args(GroupScore):
            legal = ", ".join(map(repr, get_args(GroupScore)))
            raise UserValueError(f"group_score={self.group_score!r}; legal: {legal}")
        in_group = num_experts // self.n_group
        if self.group_score == "top2_sum" and in_group < 2:
            raise UserValueError(
                f"group_score='top2_sum' with n_group={self.n_group} of num_experts={num_experts}: a group has one "
                f"expert; legal: n_group of at most {num_experts // 2}, or 'max'"
            )
        least = -(-top_k // in_group)
        if not least <= self.topk_group <= self.n_group:
            raise UserValueError(
                f"topk_group={self.topk_group} of n_group={self.n_group} with {in_group} experts each, for "
                f"top_k={top_k}; legal: {least} to {self.n_group}"
            )

    def limit(self, preferences: Tensor) -> Tensor:  # [T, E] -> [T, E]
        """-inf where an expert's group is none of the best."""
        groups = preferences.unflatten(-1, (self.n_group, -1))  # [T, G, E / G]
        of_group = groups.amax(-1) if self.group_score == "max" else groups.topk(2, dim=-1).values.sum(-1)
        best = largest(of_group, self.topk_group)
        outside = of_group.new_ones(of_group.shape, dtype=torch.bool).scatter_(-1, best, False)
        return groups.masked_fill(outside[..., None], float("-inf")).flatten(-2)
