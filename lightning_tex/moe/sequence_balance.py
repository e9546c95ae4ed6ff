"""Load balance of each sequence by itself (DeepSeek-V3, arXiv 2412.19437, Eq. 17-20)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_tex.moe.router import Route
from lightning_tex.moe.tokens import Tokens
from lightning_tex.parallel.activation_layout import ActivationLayout
from lightning_tex.parallel.collectives import sum_over
from lightning_tex.parallel.topology import Axis

# T tokens, B sequences, E experts, k choices per token


def sequence_balance_loss(route: Route, tokens: Tokens, data: Axis, layout: ActivationLayout) -> Tensor:
    """The mean over sequences, of all data ranks, of E * sum_e f_e P_e of a sequence: a scalar.

    f_e is the fraction of the sequence's choices that fell on expert e, without gradient, P_e its mean score, both over
    the sequence's tokens that are not masked; sequences without any count nowhere. As a mean over sequences it does not
    depend on layout, micro-batch or accumulation, as long as micro-steps have equally many sequences with tokens.
    """
    sums = layout.total(_sums(route, tokens))  # [B, 2 E + 1]
    experts = route.scores.shape[1]
    scores, counts, real = sums.split([experts, experts, 1], dim=1)
    fractions = counts.detach() / counts.detach().sum(1, keepdim=True).clamp(min=1)
    of_sequence = experts * (fractions * scores / real.detach().clamp(min=1)).sum(1)
    total, sequences = sum_over(torch.stack([of_sequence.sum(), (real.detach() > 0).sum().to(sums.dtype)]), data)
    return total / sequences.detach().clamp(min=1)


def _sums(route: Route, tokens: Tokens) -> Tensor:
    """Of own tokens by sequence: scores, choices of each expert, and the number of tokens. [B, 2 E + 1]"""
    scores, (count, experts) = route.scores, route.scores.shape
    length = count // max(tokens.sequences, 1)
    real = scores.new_ones(count) if tokens.mask is None else tokens.mask.to(scores.dtype)
    by_sequence = (scores * real[:, None]).view(tokens.sequences, length, experts).sum(1)
    chosen = route.indices.view(tokens.sequences, length * route.indices.shape[1])
    counts = scores.new_zeros(tokens.sequences, experts + 1).scatter_add_(
        1, chosen, torch.ones_like(chosen, dtype=scores.dtype)
    )
    return torch.cat([by_sequence, counts[:, :-1], real.view(tokens.sequences, length).sum(1, keepdim=True)], 1)
