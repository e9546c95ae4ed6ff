"""Attention, norms and rotation on a GPU: only by flash and cuDNN kernels, against fp64 on the CPU, without waiting."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.on_a_gpu import DEVICE, IS_GPU, close, no_waiting
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_tex.layers import DocumentContext, ParallelAttention, RMSNorm, Rotary, TokenContext
from lightning_tex.models import Decoder, DecoderConfig
from lightning_tex.parallel.compiled import compile_leaves

B, S = 3, 48
MASK = torch.ones(B, S, dtype=torch.bool)
MASK[0, :9] = MASK[1, 30:] = MASK[2, 5:30:3] = False
SEGMENTS = torch.stack([torch.arange(S) // length for length in (S, 7, 1)])


@contextmanager
def fast_kernels(*more: SDPBackend) -> Iterator[None]:
    """Inside no attention is computed by its definition."""
    if not IS_GPU:
        yield
        return
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, *more]):
        yield


def outcome(layer: ParallelAttention, x: Tensor, upstream: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    context = None if mask is None else TokenContext.causal(mask)
    y = layer(x, context=context)
    y = y if mask is None else y * mask[..., None]
    (y.float() * upstream.float()).sum().backward()
    assert x.grad is not None
    gradients = {f"gradient of {name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"output": y, "gradient of the input": x.grad, **gradients}


@pytest.mark.parametrize("compiled", [False, pytest.param("auto", marks=pytest.mark.full)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kv_heads", [None, 2, 1])
def test_attention_is_that_of_the_cpu_by_fast_kernels(kv_heads: int | None, padded: bool, compiled: Any) -> None:
    compile_leaves(compiled)
    torch.manual_seed(1)
    layer = ParallelAttention(256, 4, kv_heads).bfloat16()
    x, upstream = torch.randn(2, B, S, 256).bfloat16().unbind()
    mask = MASK if padded else None
    expected = outcome(copy.deepcopy(layer).double(), x.double(), upstream.double(), mask)
    with fast_kernels():
        found = outcome(layer.to(DEVICE), x.to(DEVICE), upstream.to(DEVICE), None if mask is None else mask.to(DEVICE))
    for what, value in expected.items():
        close(found[what], value, 2e-2, what)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"sinks": True}, {"softcap": 2.0}], ids=str)
def test_documents_are_those_of_the_cpu(options: dict[str, Any], padded: bool) -> None:
    torch.manual_seed(1)
    layer = ParallelAttention(256, 4, 2, **options).bfloat16()
    x, upstream = torch.randn(2, B, S, 256).bfloat16().unbind()
    real = MASK if padded else torch.ones_like(MASK)

    def run(layer: ParallelAttention, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
        x = x.clone().requires_grad_()
        segments, mask = SEGMENTS.to(x.device), real.to(x.device)
        context = DocumentContext.of(segments, mask if padded else None)
        y = layer(x, context=context) * mask[..., None]
        (y.float() * upstream.float()).sum().backward()
        assert x.grad is not None
        gradients = {f"gradient of {name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
        return {"output": y, "gradient of the input": x.grad, **gradients}

    expected = run(copy.deepcopy(layer).double(), x.double(), upstream.double())
    found = run(layer.to(DEVICE), x.to(DEVICE), upstream.to(DEVICE))
    for what, value in expected.items():
        close(found[what], value, 2e-2, what)


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_a_mask_of_pairs_needs_no_scores_of_all_pairs(kv_heads: int | None) -> None:
    layer = ParallelAttention(256, 4, kv_heads).to(DEVICE, torch.bfloat16)
    x, mask = torch.randn(B, S, 256).to(DEVICE, torch.bfloat16).requires_grad_(), MASK.to(DEVICE)
    with fast_kernels(SDPBackend.EFFICIENT_ATTENTION):
        layer(x, mask).sum().backward()


@pytest.mark.parametrize("padded", [False, True])
def test_a_decoder_uses_fast_kernels_and_does_not_wait(padded: bool) -> None:
    decoder = Decoder(DecoderConfig(61, 64, 2, 4, 2, hidden_dim=64)).to(DEVICE, torch.bfloat16)
    ids, mask = torch.randint(61, (B, S)).to(DEVICE), MASK.to(DEVICE) if padded else None
    decoder(ids, token_mask=mask).float().sum().backward()
    with fast_kernels(), no_waiting():
        decoder(ids, token_mask=mask).float().sum().backward()


@pytest.mark.parametrize("compiled", [False, pytest.param("auto", marks=pytest.mark.full)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_and_rotation_are_those_of_the_cpu(dtype: torch.dtype, compiled: Any) -> None:
    compile_leaves(compiled)
    torch.manual_seed(1)
    norm, x, upstream = RMSNorm(64, eps=1e-5), *torch.randn(2, B, S, 64).to(dtype).unbind()

    def run(norm: RMSNorm, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
        x = x.clone().requires_grad_()
        heads = norm(x).unflatten(-1, (4, 16))
        query, key = Rotary(16).tables(S, x).turn(heads, heads[:, :, :2])
        y = torch.cat([query, key], 2)
        y.backward(torch.cat([upstream, upstream[..., :32]], -1).unflatten(-1, (6, 16)))
        assert x.grad is not None and norm.weight.grad is not None
        return {"turned": y, "gradient of the input": x.grad, "gradient of the weight": norm.weight.grad}

    expected = run(copy.deepcopy(norm).double(), x.double(), upstream.double())
    found = run(norm.to(DEVICE), x.to(DEVICE), upstream.to(DEVICE))
    for what, value in expected.items():
        close(found[what], value, 1e-4 if dtype == torch.float32 else 2e-2, what)
