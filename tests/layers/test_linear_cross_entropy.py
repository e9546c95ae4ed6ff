"""Head and loss in one, chunk by chunk: values and gradients of torch's own, in any chunks, and what it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import case
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_tex.layers import (
    VocabParallelCrossEntropy,
    VocabParallelHead,
    VocabParallelLinearCrossEntropy,
    head_gradients,
    linear_cross_entropy,
)
from lightning_tex.optim.probe import Allocations
from lightning_tex.parallel.activation_checkpointing import BlockTape

B, S, D, V = 3, 5, 6, 11


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[1, 4], ids="{} tokens or more a chunk".format)
def chunks(request: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks of 4 tokens of a small vocabulary, or of all."""
    if request.param == 4:
        monkeypatch.setitem(linear_cross_entropy.CHUNK_BYTES, "cpu", 4 * V * 8)
        assert linear_cross_entropy.chunk_sizes(B * S, V, 8, "cpu") == [3, 4, 4, 4]
    return request.param


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, VocabParallelHead, Tensor]:
    head, x = VocabParallelHead(D, V).to(dtype), (4 * torch.randn(B, S, D)).to(dtype).requires_grad_()
    target = torch.randint(V, (B, S))
    target[0, :3] = -100
    return x, head, target


def gradients(loss: Tensor, x: Tensor, head: VocabParallelHead, again: bool = False) -> tuple[Tensor, ...]:
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(loss.dtype)
    return torch.autograd.grad(loss, (x, head.weight), upstream, retain_graph=again)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_capped_logits(reduction: Any, chunks: int) -> None:
    x, head, target = inputs()
    head.softcap = 1.5
    loss = VocabParallelLinearCrossEntropy(reduction=reduction)(x, head, target)
    capped = 1.5 * (x @ head.weight.T / 1.5).tanh()
    plain = F.cross_entropy(capped.transpose(1, 2), target, reduction=reduction)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(head(x), capped, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(gradients(loss, x, head), gradients(plain, x, head), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_bias(reduction: Any, chunks: int) -> None:
    head, (x, _, target) = VocabParallelHead(D, V, bias=True, softcap=2.0).double(), inputs()
    torch.nn.init.normal_(head.bias)
    loss = VocabParallelLinearCrossEntropy(reduction=reduction)(x, head, target)
    logits = 2 * ((x @ head.weight.T + head.bias) / 2).tanh()
    plain = F.cross_entropy(logits.transpose(1, 2), target, reduction=reduction)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(head(x), logits, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(loss.shape, dtype=torch.float64)
    leaves = (x, head.weight, head.bias)
    for mine, theirs in zip(
        torch.autograd.grad(loss, leaves, upstream), torch.autograd.grad(plain, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_value_and_gradients_are_torchs(reduction: Any, z_loss: float, chunks: int) -> None:
    x, head, target = inputs()
    loss = VocabParallelLinearCrossEntropy(reduction=reduction, z_loss_coefficient=z_loss)(x, head, target)
    logits = x @ head.weight.T
    plain = F.cross_entropy(logits.transpose(1, 2), target, reduction=reduction)
    z = z_loss * logits.logsumexp(-1).square() * (target != -100)
    counted = (target != -100).sum()
    plain = plain + (z if reduction == "none" else z.sum() if reduction == "sum" else z.sum() / counted)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
    expected = gradients(plain, x, head)
    for turn in range(2):  # the second backward has to make them anew
        for mine, reference in zip(gradients(loss, x, head, again=True), expected, strict=True):
            with case(turn=turn):
                torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision_is_that_of_head_and_loss_apart(dtype: torch.dtype, reduction: Any, chunks: int) -> None:
    x, head, target = inputs(dtype)
    apart = VocabParallelCrossEntropy(reduction=reduction)(head(x), target)
    loss = VocabParallelLinearCrossEntropy(reduction=reduction)(x, head, target)
    assert loss.dtype == apart.dtype == torch.float32
    torch.testing.assert_close(loss, apart, rtol=1e-6, atol=1e-6)
    wide = [t.detach().double().requires_grad_() for t in (x, head.weight)]
    exact = F.cross_entropy((wide[0] @ wide[1].T).transpose(1, 2), target, reduction=reduction)
    exact = torch.autograd.grad(exact, wide, torch.ones_like(exact))
    errors = []
    for value in (loss, apart):
        found = torch.autograd.grad(value, (x, head.weight), torch.ones_like(value))
        assert [t.dtype for t in found] == [dtype, dtype]
        errors.append([float((t.double() - e).norm() / e.norm()) for t, e in zip(found, exact, strict=True)])
    assert max(errors[0]) <= 1.5 * max(errors[1]) + 1e-7, errors


def test_autocast_is_that_of_head_and_loss_apart(chunks: int) -> None:
    x, head, target = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        apart = VocabParallelCrossEntropy(reduction="sum")(head(x), target)
        loss = VocabParallelLinearCrossEntropy(reduction="sum")(x, head, target)
    torch.testing.assert_close(loss, apart, rtol=1e-6, atol=0)
    for mine, theirs in zip(gradients(loss, x, head), gradients(apart, x, head), strict=True):
        assert mine.dtype == torch.float32
        assert float((mine - theirs).norm() / theirs.norm()) < 2**-7


@pytest.mark.parametrize("factor", [1 / 3, 3e4])
def test_a_factor_scales_narrow_gradients_in_full_precision(factor: float) -> None:
    """1/3 in bf16 would be off by a thousandth everywhere."""
    x, head, target = inputs(torch.bfloat16)
    loss = VocabParallelLinearCrossEntropy(reduction="sum")
    once = torch.autograd.grad(loss(x, head, target), (x, head.weight))
    scaled = torch.autograd.grad(loss(x, head, target) * factor, (x, head.weight))
    for plain, mine in zip(once, scaled, strict=True):
        assert torch.equal(mine, (plain.float() * torch.tensor(factor)).bfloat16())


def test_without_gradients_and_without_counted_targets(chunks: int) -> None:
    x, head, target = inputs()
    loss = VocabParallelLinearCrossEntropy()
    with torch.no_grad():
        value = loss(x, head, target)
    assert not value.requires_grad
    torch.testing.assert_close(value, loss(x, head, target).detach())
    nothing = loss(x, head, torch.full_like(target, -100))
    assert nothing == 0
    assert not any(gradient.any() for gradient in gradients(nothing, x, head))


def test_only_what_is_trained_has_a_gradient(chunks: int) -> None:
    x, head, target = inputs()
    expected = gradients(VocabParallelLinearCrossEntropy()(x, head, target), x, head)
    for frozen in (0, 1):
        kept = x.detach() if frozen == 0 else x
        head.weight.requires_grad_(frozen != 1)
        loss = VocabParallelLinearCrossEntropy()(kept, head, target)
        leaf = head.weight if frozen == 0 else x
        upstream = torch.randn((), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (mine,) = torch.autograd.grad(loss, leaf, upstream)
        torch.testing.assert_close(mine, expected[1 - frozen])


@pytest.mark.parametrize("replay", [False, True])
def test_recomputed_as_part_of_a_block(replay: bool, chunks: int) -> None:
    x, head, target = inputs()
    loss, tape = VocabParallelLinearCrossEntropy(), BlockTape(replay)
    expected = gradients(loss(x, head, target), x, head)
    again = checkpoint(lambda x: loss(x, head, target), x, use_reentrant=False, context_fn=tape.contexts)
    for mine, reference in zip(gradients(again, x, head), expected, strict=True):
        assert torch.equal(mine, reference)


def test_targets_beyond_the_vocabulary_are_refused() -> None:
    x, head, target = inputs()
    for wrong in (V, -1):
        target[1, 2] = wrong
        with pytest.raises(IndexError, match=f"targets must be between 0 and {V - 1}; found"):
            VocabParallelLinearCrossEntropy()(x, head, target)


def test_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="reduction='max'; legal: 'mean', 'sum', 'none'"):
        VocabParallelLinearCrossEntropy(reduction="max")  # type: ignore[arg-type]


# --- what it takes

# 16384 tokens, a vocabulary of 151936 and a width of 2048, each scaled down as much, and bytes by its square.
SCALE = 32
TOKENS, VOCABULARY, WIDTH = 16384 // SCALE, 151936 // SCALE, 2048 // SCALE


def bytes_per_logit(dtype: torch.dtype, apart: bool) -> float:
    head = VocabParallelHead(WIDTH, VOCABULARY).to(dtype)
    x, target = torch.randn(1, TOKENS, WIDTH).to(dtype).requires_grad_(), torch.randint(VOCABULARY, (1, TOKENS))
    with Allocations() as allocations:
        if apart:
            loss = VocabParallelCrossEntropy()(head(x), target)
        else:
            loss = VocabParallelLinearCrossEntropy()(x, head, target)
        loss.backward()
    return allocations.peak_bytes / (TOKENS * VOCABULARY)


@pytest.mark.parametrize(("dtype", "before"), [(torch.bfloat16, 10), (torch.float32, 8)], ids=str)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_peak_of_head_and_loss(device: str, dtype: torch.dtype, before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = linear_cross_entropy.CHUNK_BYTES[device] // SCALE**2
    monkeypatch.setitem(linear_cross_entropy.CHUNK_BYTES, "cpu", chunk)
    monkeypatch.setattr(head_gradients, "SLICE_BYTES", head_gradients.SLICE_BYTES // SCALE**2)
    assert bytes_per_logit(dtype, apart=False) < 1
    assert bytes_per_logit(dtype, apart=True) >= before
