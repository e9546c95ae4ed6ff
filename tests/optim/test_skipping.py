"""Steps that the device decides upon: on the CPU, as a GPU takes them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.guarded_steps import CASES, everything, made, step, whole_step
from helpers.host_reads import host_reads
from torch import nn

from lightning_tex.optim.engine import fastest
from lightning_tex.parallel.device import pretend_device

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_on_a_gpu() -> Iterator[None]:
    with pretend_device("cuda"):
        yield


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_a_step_that_is_not_finite_changes_nothing(kind: str, form: str) -> None:
    model, optimizer = made(kind, form, CPU)
    step(model, optimizer, 0)
    before = everything(optimizer)
    step(model, optimizer, 1, float("nan"))
    assert all(torch.equal(p, q) for p, q in zip(everything(optimizer), before, strict=True))
    assert (optimizer.skipped.total, optimizer.skipped.in_a_row) == (1, 1)
    step(model, optimizer, 2)
    assert (optimizer.skipped.total, optimizer.skipped.in_a_row) == (1, 0)
    assert any(not torch.equal(p, q) for p, q in zip(everything(optimizer), before, strict=True))


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_steps_are_those_that_the_host_decides_upon(kind: str, form: str) -> None:
    ours, theirs = made(kind, form, CPU), made(kind, form, CPU)
    for number, factor in enumerate((1.0, 100.0, float("inf"), 0.01)):  # clipped by more and less
        step(*ours, number, factor)
        with pretend_device("cpu"):
            step(*theirs, number, factor)
    for p, q in zip(ours[0].parameters(), theirs[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2**-7 if p.dtype == torch.bfloat16 else 1e-6, atol=1e-7)
    assert ours[1].skipped == theirs[1].skipped


def test_the_first_step_of_a_momentum_may_be_left_out() -> None:
    model, optimizer = made("SGD momentum", "fp32", CPU)
    other, never = made("SGD momentum", "fp32", CPU)
    step(model, optimizer, 0, float("nan"))
    step(model, optimizer, 1)
    step(other, never, 1)
    assert all(torch.equal(p, q) for p, q in zip(everything(optimizer), everything(never), strict=True))


def test_the_end_comes_a_step_later_and_takes_no_step_more() -> None:
    model, optimizer = made("AdamW", "fp32", CPU, max_skipped_steps=2)
    step(model, optimizer, 0)
    before = everything(optimizer)
    step(model, optimizer, 1, float("nan"))
    step(model, optimizer, 2, float("nan"))
    with pytest.raises(RuntimeError, match="last 2 steps"):
        step(model, optimizer, 3)
    assert all(torch.equal(p, q) for p, q in zip(everything(optimizer), before, strict=True))


@pytest.mark.parametrize("clip", ["norm", "value"])
@pytest.mark.parametrize(("kind", "form"), [case for case in CASES if case[0] in ("AdamW", "SGD momentum")])
def test_guard_and_clip_read_nothing(kind: str, form: str, clip: str) -> None:
    model, optimizer = made(kind, form, CPU)
    x = torch.randn(5, 7, dtype=next(model.parameters()).dtype)
    whole_step(model, optimizer, x, clip)  # makes the states
    with host_reads() as reads:
        for _ in range(3):
            whole_step(model, optimizer, x, clip)
    # The step before, whose copy has arrived while this one's backward was handed to the device.
    assert [read.place.split(":")[0] for read in reads] == ["parallel/host_copy.py"] * len(reads) and len(reads) <= 3


def test_adagrad_has_no_kernel_on_gpus() -> None:
    p = [nn.Parameter(torch.zeros(2))]
    assert not fastest(torch.optim.Adagrad(p), {"params": p}).get("fused")
    with pretend_device("cpu"):
        assert fastest(torch.optim.Adagrad(p), {"params": p})["fused"]
