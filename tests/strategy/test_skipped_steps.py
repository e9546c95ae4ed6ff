"""Steps whose gradient is not finite: skipped on all ranks, counted, and the end when there are too many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.behaviour_modules import TED
from helpers.learning import Learns, fitted
from helpers.ranks import on_ranks, together
from lightning.pytorch.plugins import MixedPrecision

from lightning_tex.callbacks import RunSummary


def guarded_run(precision: str, spoil: dict[tuple[int, int], float], most: int | None) -> Any:
    module = Learns(spoil)
    try:
        # What is NaN on one tensor rank alone is no copy any more.
        options = {**TED, "max_skipped_steps": most, "check_replicas_every_n_steps": 0}
        trainer = fitted(module, options, 6, precision=precision)
    except RuntimeError as error:
        return str(error)
    finite = all(bool(torch.isfinite(p).all()) for p in module.parameters())
    return finite, trainer.strategy.optimizers[0].skipped.total, trainer.global_step


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_steps_with_a_nan_are_skipped_and_counted(precision: str) -> None:
    spoil = {(1, 1): float("nan"), (2, 3): float("inf")}
    found = together(4, {most: (guarded_run, precision, spoil, most) for most in (2, None)})
    assert found[2] == [(True, 2, 6)] * 4
    for finite, skipped, _ in found[None]:
        assert not finite and skipped == 0


def summary_of_a_guarded_run() -> str:
    trainer = fitted(Learns({(0, 1): float("nan")}), {}, 4, callbacks=[RunSummary()])
    assert trainer.strategy.optimizers[0].skipped.total == 1
    return "done"


def test_skipped_steps_stand_in_the_summary(capfd: pytest.CaptureFixture[str]) -> None:
    on_ranks(1, summary_of_a_guarded_run)
    assert "1 optimizer steps with an infinite or NaN gradient" in capfd.readouterr().out


def test_training_stops_after_too_many_and_names_the_parameter() -> None:
    spoil = {(1, step): float("nan") for step in range(2, 6)}
    for said in on_ranks(4, guarded_run, "32-true", spoil, 3):
        assert "norm.weight (rank" in said and "last 3 steps" in said and "max_skipped_steps" in said


def scaled_run() -> tuple[str, int]:
    """With a loss scale of 4, which is 1 after two skipped steps."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    module = Learns({(0, step): float("nan") for step in range(9)})
    said = ""
    try:
        fitted(module, {"max_skipped_steps": 3}, 8, precision=None, plugins=[plugin])
    except RuntimeError as error:
        said = str(error)
    return said, module.trainer.global_step


def test_a_loss_scale_that_can_fall_no_further_is_not_to_blame() -> None:
    ((said, steps),) = on_ranks(1, scaled_run)
    assert "each of the last 3 steps" in said and "in step 5" in said and steps == 5
