"""A limit of time, Lightning's or SLURM's: a complete checkpoint in time, and on from it as if nothing had been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.signalled_runs import Slow, TimePasses, resumed_fit, slurm_fit, timed_fit

from lightning_tex.testing.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


def longer_fit(folder: str, path: str) -> Any:
    return resumed_fit(folder, path, max_time={"hours": 100})


def goes_on(folder: Path, timed: list[dict[str, Any]], undisturbed: list[dict[str, Any]]) -> None:
    """From the checkpoint that a fit with a limit of time has left."""
    (stopped,) = folder.glob("stopped-step=*.ckpt")
    done = len(timed[0]["losses"])
    assert 0 < done < 12 and stopped.name == f"stopped-step={done}.ckpt"
    resumed = run_ranks(len(undisturbed), longer_fit, str(folder), str(stopped))
    for before, after, whole in zip(timed, resumed, undisturbed, strict=True):
        assert before["losses"] + after["losses"] == whole["losses"]
        assert torch.equal(after["own"], whole["own"])


def test_max_time_saves_before_it_is_over(tmp_path: Path, undisturbed_on_two: list[dict[str, Any]]) -> None:
    goes_on(tmp_path, run_ranks(2, timed_fit, str(tmp_path), 1.5, Slow(0.3)), undisturbed_on_two)


def test_max_time_saves_in_a_validation_that_is_longer(
    tmp_path: Path, undisturbed_on_two: list[dict[str, Any]]
) -> None:
    timed = run_ranks(2, timed_fit, str(tmp_path), 3600.0, TimePasses(rank=1))
    assert [len(own["losses"]) for own in timed] == [4] * 2
    assert [own["validated"] for own in timed] == [6] * 2, "the validation is run to its end"
    goes_on(tmp_path, timed, undisturbed_on_two)


def fake_scontrol(folder: Path, code: int = 0) -> Path:
    """A command that writes down what it is asked for."""
    called = folder / "called"
    command = folder / "scontrol"
    command.write_text(f"#!/bin/sh\necho $@ >> {called}\nexit {code}\n")
    command.chmod(0o755)
    return called


@pytest.mark.parametrize("run", ["undisturbed_on_two", pytest.param("undisturbed", marks=pytest.mark.faults)])
def test_slurm_signals_one_node_and_requeues(tmp_path: Path, request: pytest.FixtureRequest, run: str) -> None:
    undisturbed: list[dict[str, Any]] = request.getfixturevalue(run)
    world = len(undisturbed)
    called = fake_scontrol(tmp_path)
    first = run_ranks(world, slurm_fit, str(tmp_path), world - 1)
    assert [own["code"] for own in first] == [138] * world
    assert called.read_text() == "requeue 4711\n", "once, by one rank"
    second = run_ranks(world, slurm_fit, str(tmp_path), -1)
    for before, after, whole in zip(first, second, undisturbed, strict=True):
        assert after["code"] == 0
        assert before["losses"] + after["losses"] == whole["losses"]
        assert torch.equal(after["own"], whole["own"])
