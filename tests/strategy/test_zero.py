"""ZeRO stages through the Trainer train alike, and a rank without a loss leaves nobody waiting."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers.behaviour_modules import PublicNames
from helpers.layout_errors import distance
from helpers.learning import LAYOUTS, fitted
from helpers.ranks import on_ranks, together
from helpers.trainers import gathered
from torch import Tensor


def stage_run(layout: Any, stage: int, flags: dict[str, Any]) -> Any:
    module = PublicNames()
    trainer = fitted(module, {**layout, "zero_stage": stage}, 4, precision="64-true", **flags)
    return module.mean_losses(trainer), gathered(module, trainer)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_zero_stage_trains_alike(name: str) -> None:
    flags = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    found = together(4, {stage: (stage_run, LAYOUTS[name], stage, flags) for stage in (0, 1, 2)})
    expected_losses, expected = found[1][0]
    assert expected_losses[-1] < expected_losses[0]
    for stage in (0, 2):
        for losses, parameters in found[stage]:
            torch.testing.assert_close(losses, expected_losses, rtol=1e-10, atol=0)
            assert all(distance(parameters[key], value) <= 1e-10 for key, value in expected.items())


class ManualTwice(PublicNames):
    """Manual optimization, two backwards a step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for half in zip(*(part.chunk(2) for part in batch), strict=True):
            self.manual_backward(self.loss(list(half)))
        optimizer.step()


def manual_run(stage: int) -> dict[str, Tensor]:
    module = ManualTwice()
    trainer = fitted(module, {"expert_parallel_size": 2, "zero_stage": stage}, precision="64-true", max_steps=4)
    return gathered(module, trainer)


def test_manual_optimization_under_zero_2() -> None:
    found = together(2, {stage: (manual_run, stage) for stage in (1, 2)})
    expected = found[1][0]
    for parameters in found[2]:
        assert all(distance(parameters[key], value) <= 1e-10 for key, value in expected.items())


class LeavesOut(PublicNames):
    """Has no loss for one batch on one rank."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return None if (self.trainer.global_rank, batch_idx) == (1, 1) else loss


def without_a_loss(stage: int) -> None:
    fitted(LeavesOut(), {"expert_parallel_size": 2, "zero_stage": stage}, accumulate_grad_batches=2)


@pytest.mark.parametrize("stage", [2, pytest.param(0, marks=pytest.mark.full), pytest.param(1, marks=pytest.mark.full)])
def test_a_rank_without_a_loss_is_an_error_and_leaves_nobody_waiting(stage: int) -> None:
    with pytest.raises(AssertionError, match=r"training_step returned None on rank 1: .*0 \* loss") as error:
        on_ranks(2, without_a_loss, stage)
    assert "still running" not in str(error.value)


def test_no_loss_in_a_run_of_one_process_is_lightnings_business() -> None:
    on_ranks(1, without_a_loss_alone)


class LeavesOutAlone(PublicNames):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        return super().training_step(batch, batch_idx) if batch_idx else None


def without_a_loss_alone() -> None:
    module = LeavesOutAlone()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*returned `None`")
        trainer = fitted(module, {}, 4)
    assert trainer.global_step == 4
