"""Windows, sinks, scales and caps of attention's scores against a plain loop over heads and positions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_tex.layers import ParallelAttention, TokenContext
from lightning_tex.layers.attention_scores import AttentionScores

B, H, G, S, D, C = 2, 4, 2, 7, 6, 4


def by_hand(scores: AttentionScores, query: Tensor, key: Tensor, value: Tensor, sees: Any, sinks: Any) -> Tensor:
    result = torch.zeros(B, H, S, C, dtype=torch.float64)
    for b, h, t in itertools.product(range(B), range(H), range(S)):
        g, weights, mixed = h // (H // G), [], []
        for s in range(S):
            if sees(b, t, s) and (scores.window is None or t - s < scores.window):
                score = query[b, h, t] @ key[b, g, s] * scores.scale
                if scores.softcap is not None:
                    score = scores.softcap * torch.tanh(score / scores.softcap)
                weights.append(torch.exp(score))
                mixed.append(torch.exp(score) * value[b, g, s])
        if sinks is not None:
            weights.append(torch.exp(sinks[h]))
        result[b, h, t] = sum(mixed) / sum(weights)
    return result


KINDS = {
    "sinks": (AttentionScores(D**-0.5), True),
    "window": (AttentionScores(0.7, window=3), False),
    "window and sinks": (AttentionScores(D**-0.5, window=2), True),
    "cap": (AttentionScores(1.3, softcap=0.8), False),
    "cap, window and sinks": (AttentionScores(1.3, window=4, softcap=0.8), True),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_definition(kind: str, masked: bool) -> None:
    scores, has_sinks = KINDS[kind]
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    query, key, value = randn(B, H, S, D), randn(B, G, S, D), randn(B, G, S, C)
    sinks = randn(H) if has_sinks else None
    visible = None
    if masked:
        visible = (torch.rand(B, 1, S, S, generator=generator) > 0.4) & torch.ones(S, S).tril().bool()
        visible |= torch.eye(S, dtype=torch.bool)
    expected = by_hand(
        scores, query, key, value, lambda b, t, s: s <= t and (visible is None or visible[b, 0, t, s]), sinks
    )
    found = scores.attend(query, key, value, visible, True, 0.0, sinks)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    leaves = [query, key, value, *([sinks] if has_sinks else [])]
    upstream = randn(B, H, S, C).detach()
    for mine, theirs in zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_causal_sinks_ask_for_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that flash kernels take them: equal widths in eights, and heads in groups."""
    given: list[dict[str, Any]] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def noted(*tensors: Tensor, **options: Any) -> Tensor:
        given.append({**options, "widths": {t.shape[-1] % 8 for t in tensors}, "heads": tensors[1].shape[1]})
        return real(*tensors, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    ParallelAttention(32, 4, 2, sinks=True)(torch.randn(2, 6, 32)).sum().backward()
    (call,) = given
    assert call["attn_mask"] is None and call["is_causal"] and call["enable_gqa"]
    assert call["widths"] == {0} and call["heads"] == 2


def test_a_window_counts_tokens_and_no_padding() -> None:
    torch.manual_seed(0)
    layer = ParallelAttention(16, 2, window=2, sinks=True).double()
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 0, 1, 1, 0, 1]]).bool()
    padded = torch.full((1, 7, 16), 1e3, dtype=torch.float64)
    padded[mask] = x[0]
    found = layer(padded, context=TokenContext.causal(mask))[mask]
    torch.testing.assert_close(found, layer(x)[0], rtol=1e-12, atol=1e-12)
    assert math.isfinite(layer(padded, mask).sum().detach())  # where some see nothing but themselves
