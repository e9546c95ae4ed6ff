"""Attention of documents: what its kernel for sequences of any length is given, and that no mask of pairs is made."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.host_reads import host_reads
from torch import Tensor

from lightning_tex.layers import DocumentContext, ParallelAttention, ParallelLatentAttention, document_context

SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2], [0] * 6, [3, 4, 4, 4, 4, 5]])
LAYERS: dict[str, Any] = {
    "heads in groups": lambda: ParallelAttention(32, 4, 2),
    "window": lambda: ParallelAttention(32, 4, 2, window=2, scale=0.7),
    "narrow values": lambda: ParallelLatentAttention(32, 4, 8, 4, 4, 6),
}


def by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    **options: Any,
) -> Tensor:
    """What torch says of ``varlen_attn``: sequences one behind the other, cut at ``cu_seq_q``, with a window."""
    before, after = options["window_size"]
    assert after == 0 and query.shape[-1] == value.shape[-1] and cu_seq_q.dtype == torch.int32
    shared = query.shape[1] // key.shape[1]
    assert shared == 1 or options["enable_gqa"]
    results = []
    for begin, end in pairwise(cu_seq_q.tolist()):
        assert end - begin <= max_q == max_k
        q = query[begin:end].transpose(0, 1)
        k, v = (x[begin:end].transpose(0, 1).repeat_interleave(shared, 0) for x in (key, value))
        seen = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
        seen = seen if before == -1 else seen.triu(-before)
        scores = (q @ k.mT * options["scale"]).masked_fill(~seen, float("-inf"))
        results.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(results)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_kernel_for_any_length_is_given_what_single_calls_are(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, context = LAYERS[kind]().double(), DocumentContext.of(SEGMENTS)
    x = torch.randn(3, 6, 32, dtype=torch.float64)
    upstream = torch.randn_like(x)
    expected = layer(x, context=context)
    expected_gradients = torch.autograd.grad(expected, list(layer.parameters()), upstream)
    monkeypatch.setattr(document_context, "_has_kernel", lambda *_: True)
    monkeypatch.setattr(document_context, "varlen_attn", by_definition)
    found = layer(x, context=context)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(found, list(layer.parameters()), upstream)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("padded", [False, True])
def test_the_host_reads_where_documents_begin_and_nothing_else(padded: bool) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1], [1] * 6]) if padded else None
    with host_reads() as reads:
        context = DocumentContext.of(SEGMENTS, mask)
    assert [read.what for read in reads] == ["cpu", "aten.nonzero", "tolist"]  # the others are of the copy
    layer, x = ParallelAttention(32, 4, 2), torch.randn(3, 6, 32)
    with host_reads() as reads:
        layer(x, context=context).sum().backward()
    assert reads == []


def test_no_mask_of_pairs_and_a_call_for_each_document(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, bool]] = []
    real = F.scaled_dot_product_attention

    def noted(*tensors: Tensor, **options: Any) -> Tensor:
        calls.append((tensors[0].shape[2], options["attn_mask"] is None and options["is_causal"]))
        return real(*tensors, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    layer, x = ParallelAttention(32, 4, 2), torch.randn(3, 6, 32)
    layer(x, context=DocumentContext.of(SEGMENTS)).sum().backward()
    assert calls == [(length, True) for length in (3, 2, 1, 6, 1, 4, 1)]
    calls.clear()
    layer(x, context=DocumentContext.of(torch.zeros(3, 6).long()))  # all whole: one call for all of them
    assert calls == [(6, True)]
