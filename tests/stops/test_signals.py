"""A signal to any rank, at any point: all ranks end at one step, and the run goes on bit-equal from what they leave."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.signalled_runs import POINTS, STEPS, resumed_fit, stopped_evaluation, stopped_fit

from lightning_tex.testing.ranks import run_ranks

# It holds what the run before left.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
CODES = {TERM: 143, INT: 1, USR1: 138}


def stops_and_goes_on(
    folder: Path, undisturbed: list[dict[str, Any]], ranks: list[int], point: str, numbers: list[int], step: int = 4
) -> None:
    world = len(undisturbed)
    ended = run_ranks(world, stopped_fit, str(folder), ranks, point, step, numbers)
    assert [own["code"] for own in ended] == [CODES[numbers[0]]] * world
    assert all(own["restored"] for own in ended)
    done = len(ended[0]["losses"])
    assert step <= done <= step + 1, "stopped at the end of the step"
    stopped = f"stopped-step={done}.ckpt"
    assert stopped in ended[0]["left"]
    resumed = run_ranks(world, resumed_fit, str(folder), str(folder / stopped))
    for before, after, whole in zip(ended, resumed, undisturbed, strict=True):
        assert before["losses"] + after["losses"] == whole["losses"]
        assert torch.equal(after["own"], whole["own"])
        assert after["seen"] == STEPS


def test_stops_and_goes_on(tmp_path: Path, undisturbed_on_two: list[dict[str, Any]]) -> None:
    stops_and_goes_on(tmp_path, undisturbed_on_two, [1], "forward", [TERM])


def test_all_ranks_are_signalled_twice_while_they_save(
    tmp_path: Path, undisturbed_on_two: list[dict[str, Any]]
) -> None:
    stops_and_goes_on(tmp_path, undisturbed_on_two, [0, 1], "save", [USR1, USR1])


@pytest.mark.faults
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("ranks", [[0], [1], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("number", [TERM, INT, USR1], ids=str)
def test_every_signal_at_every_point(
    tmp_path: Path, undisturbed: list[dict[str, Any]], number: int, ranks: list[int], point: str, times: int
) -> None:
    stops_and_goes_on(tmp_path, undisturbed, ranks, point, [number] * times)


def test_at_the_validation_that_ends_an_epoch(tmp_path: Path, undisturbed_on_two: list[dict[str, Any]]) -> None:
    stops_and_goes_on(tmp_path, undisturbed_on_two, [1], "validation", [TERM], step=6)


@pytest.mark.parametrize("stage", ["test", "predict", pytest.param("validate", marks=pytest.mark.faults)])
def test_outside_of_a_fit_all_ranks_leave_at_one_step(stage: str) -> None:
    assert run_ranks(2, stopped_evaluation, stage) == [(CODES[TERM], 3)] * 2


def test_in_one_process(tmp_path: Path) -> None:
    undisturbed = run_ranks(1, resumed_fit, str(tmp_path / "undisturbed"))
    stops_and_goes_on(tmp_path / "stopped", undisturbed, [0], "backward", [INT])
