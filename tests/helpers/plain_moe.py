"""A mixture of experts as loops over tokens and choices: what the layer is held to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Outcome:
    output: Tensor
    choices: list[list[int]]  # of each token; empty where masked
    overflowed: int
    scores: Tensor
    logits: Tensor


def plain_moe(
    layer, x: Tensor, mask: Tensor | None = None, capacity: int | None = None, order: list[int] | None = None
) -> Outcome:
    """One token after the other, [T, D]. ``layer`` gives the weights; ``capacity`` None serves every choice.

    ``order``: in which tokens stand in an expert's queue; None: their own.
    """
    logits = x @ layer.router.weight.T
    scores = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    top_k = layer.top_k
    choices = []
    for t in range(len(x)):
        best = sorted(range(layer.num_experts), key=lambda e, t=t: -scores[t, e].item())[:top_k]
        choices.append(best if mask is None or mask[t] else [])
    taken = [0] * layer.num_experts
    overflowed = 0
    rows = [torch.zeros_like(x[0]) for _ in range(len(x))]
    for i in range(top_k):
        for t in order or range(len(x)):
            chosen = choices[t]
            if not chosen:
                continue
            e = chosen[i]
            if capacity is not None and taken[e] == capacity:
                overflowed += 1
                continue
            taken[e] += 1
            weight = scores[t, e]
            if layer.router.norm_topk_prob:
                weight = weight / sum(scores[t, c] for c in chosen)
            rows[t] = rows[t] + weight * expert(layer.experts, e, x[t])
    output = torch.stack(rows) if rows else x * 1
    return Outcome(output, choices, overflowed, scores, logits)


def expert(experts, e: int, x: Tensor) -> Tensor:
    up = experts.up[e] @ x
    if experts.gate is None:
        hidden = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
    else:
        gate = experts.gate[e] @ x
        hidden = gate / (1 + torch.exp(-gate)) * up
    return experts.down[e] @ hidden


def plain_losses(outcomes: list[Outcome], masks: list[Tensor | None], num_experts: int) -> tuple[Tensor, Tensor]:
    """Load-balance and z-loss of the union of some ranks' tokens."""
    counts, score_sum, z_sum, tokens = [0] * num_experts, [0.0] * num_experts, 0.0, 0
    for outcome, mask in zip(outcomes, masks, strict=True):
        for t, chosen in enumerate(outcome.choices):
            if mask is not None and not mask[t]:
                continue
            tokens += 1
            z_sum = z_sum + torch.log(torch.exp(outcome.logits[t]).sum()) ** 2
            for e in chosen:
                counts[e] += 1
            for e in range(num_experts):
                score_sum[e] = score_sum[e] + outcome.scores[t, e]
    fractions = [n / max(sum(counts), 1) for n in counts]
    balance = num_experts * sum(f * s / max(tokens, 1) for f, s in zip(fractions, score_sum, strict=True))
    zero = torch.zeros((), dtype=torch.float64)
    return balance + zero, z_sum / max(tokens, 1) + zero
