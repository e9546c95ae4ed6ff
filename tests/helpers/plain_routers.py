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


def sigmoid(router: Any, x: Tensor, mask: list[bool], **_: Any) -> Choices:
    """The bias has a part in the choice, and none in the weights."""
    choices: Choices = []
    for token, real in zip(x, mask, strict=True):
        scores = [1 / (1 + torch.exp(-(row * token).sum())) for row in router.weight]
        wanted = [s.item() + b.item() for s, b in zip(scores, router.correction_bias, strict=True)]
        choices.append({e: scores[e] for e in best(wanted, router.top_k)} if real else {})
    return choices


def grouped(router: Any, x: Tensor, mask: list[bool], **_: Any) -> Choices:
    """The best groups by their best expert, and of their experts the best."""
    size, choices = router.num_experts // router.groups.n_group, []
    for row, real in zip(softmax_of(router, x), mask, strict=True):
        scores = row.tolist()
        of_groups = [max(scores[g * size : (g + 1) * size]) for g in range(router.groups.n_group)]
        legal = [e for g in best(of_groups, router.groups.topk_group) for e in range(g * size, (g + 1) * size)]
        chosen = sorted(legal, key=lambda e, scores=scores: (-scores[e], e))[: router.top_k] if real else []
        choices.append({e: row[e] for e in chosen})
    return choices


def sparsemixer(router: Any, x: Tensor, mask: list[bool], **_: Any) -> Choices:
    """One choice after the other; each is weighted among those left that are not far below it."""
    choices: Choices = []
    for token, real in zip(x, mask, strict=True):
        left = {e: (row * token).sum() for e, row in enumerate(router.weight)} if real else {}
        chosen: dict[int, Tensor] = {}
        while real and len(chosen) < router.top_k:
            top = max(left, key=lambda e, left=left: (left[e].item(), -e))
            most = left[top].item()
            near = [
                e for e in left if (most - left[e].item()) / max(abs(left[e].item()), most) <= 2 * router.jitter_eps
            ]
            chosen[top] = torch.exp(left[top]) / sum(torch.exp(left[e]) for e in near)
            del left[top]
        choices.append(chosen)
    return choices


def forced_balance(router: Any, x: Tensor, mask: list[bool], **_: Any) -> Choices:
    """Experts in turn, whatever the scores are."""
    k, experts = router.top_k, router.num_experts
    return [
        {(t * k + i) % experts: row[(t * k + i) % experts] for i in range(k)} if real else {}
        for t, (row, real) in enumerate(zip(softmax_of(router, x), mask, strict=True))
    ]


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
    "sigmoid": sigmoid,
    "groups": grouped,
    "sparsemixer": sparsemixer,
    "forced_balance": forced_balance,
    "switch": switch,
    "gshard": gshard,
    "sinkhorn": sinkhorn,
    "hash": hashed,
    "expert_choice": expert_choice,
}
