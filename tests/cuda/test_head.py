"""Head and loss in one on a GPU: against fp64 on the CPU, without waiting, and in less than a byte a logit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.on_a_gpu import DEVICE, IS_GPU, close, no_waiting
from torch import Tensor

from lightning_tex.layers import VocabParallelHead, VocabParallelLinearCrossEntropy, linear_cross_entropy
from lightning_tex.parallel.compiled import compile_leaves

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
T, V, D = 96, 520, 64


def outcome(head: VocabParallelHead, x: Tensor, target: Tensor, **options: Any) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    loss = VocabParallelLinearCrossEntropy(**options)(x, head, target)
    (loss * 0.25).sum().backward()
    assert x.grad is not None and head.weight.grad is not None
    return {"loss": loss, "gradient of the input": x.grad, "gradient of the matrix": head.weight.grad}


@pytest.mark.parametrize("compiled", [False, pytest.param("auto", marks=pytest.mark.full)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunks", [1, 5])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_a_loss_is_that_of_the_cpu(
    dtype: torch.dtype, chunks: int, reduction: str, compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_leaves(compiled)
    torch.manual_seed(1)
    head, x = VocabParallelHead(D, V).to(dtype), torch.randn(2, T // 2, D).to(dtype)
    target = torch.randint(V, (2, T // 2))
    target[0, :7] = -100
    options = {"reduction": reduction, "z_loss_coefficient": 1e-2}
    expected = outcome(copy.deepcopy(head).double(), x.double(), target, **options)
    monkeypatch.setitem(linear_cross_entropy.CHUNK_BYTES, "cuda", -(-T // chunks) * V * dtype.itemsize)
    found = outcome(head.to(DEVICE), x.to(DEVICE), target.to(DEVICE), **options)
    for what, value in expected.items():
        close(found[what], value, TOLERANCE[dtype], f"{what} in {dtype}")


def test_nothing_waits() -> None:
    head, x = VocabParallelHead(D, V).to(DEVICE), torch.randn(2, 48, D, device=DEVICE)
    target = torch.randint(V, (2, 48), device=DEVICE)
    outcome(head, x, target)
    with no_waiting():
        outcome(head, x, target)


@pytest.mark.skipif(not IS_GPU, reason="needs the allocator's statistics")
def test_peak_of_head_and_loss() -> None:
    """4096 tokens, a vocabulary of 37984 and a width of 512: a quarter of Qwen3 with 16k tokens; chunks a 16th."""
    tokens, vocabulary, width = 4096, 37984, 512
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(linear_cross_entropy.CHUNK_BYTES, "cuda", linear_cross_entropy.CHUNK_BYTES["cuda"] // 16)
        head = VocabParallelHead(width, vocabulary).to(DEVICE, torch.bfloat16)
        x, target = torch.randn(1, tokens, width), torch.randint(vocabulary, (1, tokens))
        x, target = x.to(DEVICE, torch.bfloat16), target.to(DEVICE)
        outcome(head, x, target)
        head.weight.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        outcome(head, x, target)
        assert torch.cuda.max_memory_allocated() - before < tokens * vocabulary
