"""Numbers of tables of choices: how even, how much a token or source tells of its experts, and what is typical."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# N rows, such as tokens of the vocabulary, E experts


class Spread(NamedTuple):
    """Of loads, the choices of experts by their mean: largest, smallest, standard deviation; and who has none."""

    largest: float
    smallest: float
    variation: float
    dead: list[int]


def spread(choices: Tensor) -> Spread:
    """Of choices of each expert. [E]"""
    loads = choices.double() / choices.double().mean().clamp(min=1e-9)
    dead = (choices == 0).nonzero().flatten().tolist()
    return Spread(float(loads.max()), float(loads.min()), float(loads.std(correction=0)), dead)


def told(table: Tensor) -> float:
    """How much a choice's row tells of its expert: their mutual information by the expert's entropy, 0 to 1.

    0: every row uses experts alike; 1: a row has one expert. Rows of few choices tell too much, by chance.

    Args:
        table: choices. [N, E]
    """
    shares = table.double() / table.sum().clamp(min=1)
    of_experts = torch.special.entr(shares.sum(0)).sum()
    of_rows, of_both = torch.special.entr(shares.sum(1)).sum(), torch.special.entr(shares).sum()
    return float((of_experts + of_rows - of_both) / of_experts) if of_experts > 0 else 0.0


def lift(table: Tensor) -> Tensor:
    """Choices relative to what they would be if rows and columns had nothing to do with each other; 1 where nothing is.

    Args:
        table: choices. [N, E]
    """
    numbers = table.double()
    expected = numbers.sum(1, keepdim=True) * numbers.sum(0, keepdim=True) / numbers.sum().clamp(min=1)
    return torch.where(expected > 0, numbers / expected.clamp(min=1e-30), 1.0)


def typical(table: Tensor, expert: int, most: int) -> list[int]:
    """Rows that make an expert's choices differ most from everybody's: p(row | e) log(p(row | e) / p(row)).

    Args:
        table: choices. [N, E]
        most: so many at most.
    """
    of_expert, of_all = table[:, expert].double(), table.sum(1).double()
    p, q = of_expert / of_expert.sum().clamp(min=1), of_all / of_all.sum().clamp(min=1)
    weight = torch.where(p > 0, p * (p / q.clamp(min=1e-30)).log(), 0.0)
    best = weight.topk(min(most, len(weight))).indices
    return [row for row in best.tolist() if weight[row] > 0]
