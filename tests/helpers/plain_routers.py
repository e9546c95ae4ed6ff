"""Routers as loops over tokens, written from their papers' definitions: what the classes are held to.

Each gives, for a router's weights and its tokens, every token's experts and their weights, with gradients.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_tex.moe.noise import token_uniform

# Of one token: its experts, and the weight of each.
Choices = list[dict[int, Tensor]]


def softmax_of(router: Any, x: Tensor) -> Tensor:  # [T, D] -> [T, E]
    rows = []
    for token in x:
        exponentials = [torch.exp((router.weight[e] * token).sum()) for e in range(router.num_experts)]
        rows.append(torch.stack(exponentials) / sum(exponentials))
    return torch.stack(rows) if rows else x.new_zeros(0, router.num_experts)


def best(scores: list[float], k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:k]


def softmax(router: Any, x: Tensor, mask: list[bool], **_: Any) -> Choices:
    choices: Choices = []
    for row, real in zip(softmax_of(router, x), mask, strict=True):
        chosen = best(row.tolist(), router.top_k) if real else []
        total = sum(row[e] for e in chosen) if router.norm_topk_prob else 1
        choices.append({e: row[e] / total for e in chosen})
    return choices


def switch(
    router: Any, x: Tensor, mask: list[bool], key: Tensor | None = None, places: Any = None, **_: Any
) -> Choices:
    if key is not None:
        numbers = token_uniform(key, torch.tensor(places), x.shape[1]).double()
        x = x * (1 - router.jitter_eps + 2 * router.jitter_eps * numbers)
    return softmax(router, x, mask)


def gshard(
    router: Any, x: Tensor, mask: list[bool], key: Tensor | None = None, places: Any = None, **_: Any
) -> Choices:
    """Algorithm 1: the second expert with a probability of twice its gate, where that is below 1."""
    choices: Choices = []
    for t, chosen in enumerate(softmax(router, x, mask)):
        if key is not None and chosen:
            first, second = sorted(chosen, key=lambda e: (-chosen[e].item(), e))
            drawn = token_uniform(key, torch.tensor([places[t]]), 1).item()
            chosen = chosen if 2 * chosen[second].item() > drawn else {first: chosen[first]}
        choices.append(chosen)
    return choices


def sinkhorn(router: Any, x: Tensor, mask: list[bool], training: bool = False, **_: Any) -> Choices:
    """Rows of real tokens, then columns, are scaled to equal sums, in turn."""
    scores = softmax_of(router, x)
    plan = scores.detach().clone()
    real = [t for t in range(len(x)) if mask[t]]
    for _turn in range(router.iterations if training else 0):
        for t in real:
            plan[t] /= plan[t].sum()
        for e in range(router.num_experts):
            plan[:, e] /= sum(plan[t, e].item() for t in real) or 1
    return [
        {e: row[e] for e in best(p.tolist(), router.top_k)} if m else {}
        for row, p, m in zip(scores, plan, mask, strict=True)
    ]


def hashed(router: Any, x: Tensor, mask: list[bool], ids: Any = None, **_: Any) -> Choices:
    """Every token of the vocabulary has its own experts, whatever the activations are."""
    weight = torch.tensor(1 / router.top_k, dtype=x.dtype)
    return [dict.fromkeys(router._hashed(ids[t : t + 1])[0].tolist(), weight) if mask[t] else {} for t in range(len(x))]


def expert_choice(router: Any, x: Tensor, mask: list[bool], groups: Any = None, **_: Any) -> Choices:
    """Each expert takes the ceil(k n / E) best of a group's n real tokens."""
    scores, choices = softmax_of(router, x), [{} for _ in x]
    for group in groups:
        real = [t for t in group if mask[t]]
        each = math.ceil(router.top_k * len(real) / router.num_experts)
        for e in range(router.num_experts):
            for t in sorted(real, key=lambda t, e=e: (-scores[t, e].item(), t))[:each]:
                choices[t][e] = scores[t, e]
    return choices


PLAIN = {
    "softmax": softmax,
    "switch": switch,
    "gshard": gshard,
    "sinkhorn": sinkhorn,
    "hash": hashed,
    "expert_choice": expert_choice,
}
