"""The tiled optimizer on a GPU: every format and kind against the CPU, guard and clipping without waiting."""

from __future__ import annotations

import pytest
import torch
from helpers.guarded_steps import CASES, FORMATS, KINDS, everything, gradients, made, step, values, whole_step
from helpers.on_a_gpu import DEVICE, IS_GPU, close, no_waiting
from helpers.optimizer_alone import network, tiled
from torch.profiler import ProfilerActivity, profile


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_steps_are_those_of_the_cpu(kind: str, form: str) -> None:
    ours, theirs = made(kind, form, DEVICE), made(kind, form, torch.device("cpu"))
    for number in range(4):
        for model, optimizer in (ours, theirs):
            step(model, optimizer, number)
    # Rounded to bf16 a value may be one step of 2^-8 off where the two devices' fp32 values differ in the last bit.
    tolerance = {"fp64": 1e-10, "fp32": 1e-5}.get(form, 4e-3)
    for found, expected in zip(values(ours[1]), values(theirs[1]), strict=True):
        close(found, expected, tolerance, f"{kind}, {form}: {expected.dtype} values after 4 steps")


@pytest.mark.parametrize(("kind", "form"), CASES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(kind: str, form: str, bad: float) -> None:
    model, optimizer = made(kind, form, DEVICE)
    step(model, optimizer, 0)
    before = everything(optimizer)
    step(model, optimizer, 1, bad)
    after = everything(optimizer)
    changed = [i for i, (p, q) in enumerate(zip(after, before, strict=True)) if not torch.equal(p, q)]
    assert not changed, f"{kind}, {form}: tensors {changed} of {len(before)} (states, then parameters) changed"
    assert (optimizer.skipped.total, optimizer.skipped.in_a_row) == (1, 1)
    step(model, optimizer, 2)
    assert (optimizer.skipped.total, optimizer.skipped.in_a_row) == (1, 0)
    assert any(not torch.equal(p, q) for p, q in zip(everything(optimizer), before, strict=True))


def test_the_first_step_may_be_one_that_is_not_finite() -> None:
    for kind in KINDS:
        model, optimizer = made(kind, "fp32", DEVICE)
        other, never = made(kind, "fp32", DEVICE)
        step(model, optimizer, 0, float("nan"))
        step(model, optimizer, 1)
        step(other, never, 1)
        for p, q in zip(values(optimizer), values(never), strict=True):
            close(p, q, 1e-6, f"{kind} after a first step that was left out")


def test_too_many_in_a_row_are_an_error_and_nothing_is_taken_any_more() -> None:
    model, optimizer = made("AdamW", "fp32", DEVICE)
    step(model, optimizer, 0)
    before = everything(optimizer)
    for number in range(1, 4):
        step(model, optimizer, number, float("nan"))
    with pytest.raises(RuntimeError, match="last 3 steps"):
        step(model, optimizer, 4)
    assert all(torch.equal(p, q) for p, q in zip(everything(optimizer), before, strict=True))


@pytest.mark.parametrize(
    ("form", "clip", "zero_stage"),
    [
        *((form, "norm", 1) for form in FORMATS),
        *((form, "value", stage) for form in ("fp32", "masters") for stage in (0, 1, 2)),
    ],
)
def test_nothing_waits_for_the_gpu(form: str, clip: str, zero_stage: int) -> None:
    model, optimizer = made("AdamW", form, DEVICE, zero_stage=zero_stage)
    x = torch.randn(5, 7, device=DEVICE, dtype=FORMATS[form][0])
    for number in range(4):
        if number:  # the first step makes the states
            with no_waiting():
                whole_step(model, optimizer, x, clip)
        else:
            whole_step(model, optimizer, x, clip)
    assert optimizer.skipped.total == 0


@pytest.mark.parametrize("kind", ["AdamW", "Adam", "SGD", "SGD momentum"])
def test_the_kernel_decides_and_clips_as_the_host_does(kind: str) -> None:
    """Beside torch's own optimizer and clipping on the same device."""
    model, optimizer = made(kind, "fp32", DEVICE)
    plain = network(torch.float32).to(DEVICE)
    other = KINDS[kind](plain.parameters())
    for number in range(4):
        step(model, optimizer, number, 3.0)
        for p, q in zip(plain.parameters(), gradients(number, 3.0), strict=True):
            p.grad = q.to(DEVICE)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        other.step()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        close(p, q, 1e-5, f"{name} by {kind}")


@pytest.mark.skipif(not IS_GPU, reason="the profiler counts launches of a GPU")
def test_launches_of_a_step_and_its_norm() -> None:
    model = torch.nn.Linear(1 << 13, 1 << 13, bias=False, device=DEVICE).bfloat16()
    optimizer = tiled(model, torch.optim.AdamW(model.parameters()), None, max_skipped_steps=3)
    optimizer.step()  # makes the states
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        optimizer.clip_by_norm(1.0)
        optimizer.step()
    launched = sum(event.count for event in record.key_averages() if event.key.startswith("cudaLaunchKernel"))
    assert 0 < launched <= 60, launched
