"""Steps whose gradient is not finite: skipped on all ranks, counted, and the end when there are too many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.behaviour_modules import TED
from helpers.learning import Learns, fitted
from helpers.ranks import on_ranks, together

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
