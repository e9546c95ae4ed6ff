"""Ranks that are killed again and again: what goes on from the newest checkpoint ends as if nothing had been."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers import restarted_run
from helpers.restarted_run import WORLD
from helpers.stops import run_command
from helpers.tiny_recipe import write_recipe

from lightning_tex.saving import consolidated, latest
from lightning_tex.testing.ranks import run_ranks

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("seed", [1, 2])
def test_ten_kills_under_torchrun(tmp_path: Path, seed: int) -> None:
    (tmp_path / "undisturbed").mkdir()
    undisturbed = run_ranks(WORLD, restarted_run.run, str(tmp_path / "undisturbed"), 0, 0)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    script = ["--max-restarts", "10", restarted_run.__file__, "10", str(seed)]
    ending = run_command([*torchrun, *script], folder=tmp_path, start=550)
    assert ending.codes[0] == 0, ending.text
    assert len(list(tmp_path.glob("attempt.*"))) == 11
    for rank, whole in enumerate(undisturbed):
        assert torch.equal(torch.load(tmp_path / f"own.{rank}", weights_only=True), whole)


def test_a_command_that_restarts_itself(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("undisturbed", "killed")}
    for name, folder in folders.items():
        folder.mkdir()
        recipe = write_recipe(folder)
        killed = {"class_path": "helpers.restarted_run.Killed", "init_args": {"attempts": 2 * (name == "killed")}}
        fit = [sys.executable, "-m", "lightning_tex", "fit", "--config", str(recipe), "--restarts", "2"]
        ending = run_command([*fit, f"--trainer.callbacks+={killed}"], folder=folder, start=250)
        assert ending.codes[0] == 0, ending.text
        assert len(list(folder.glob("attempt.*"))) == 1 + 2 * (name == "killed")
    newest = {name: next(folder.rglob("*.ckpt")).parent for name, folder in folders.items()}
    last = {name: latest(folder) for name, folder in newest.items()}
    assert last["killed"] is not None and last["undisturbed"] is not None
    assert last["killed"].name == last["undisturbed"].name
    whole = {name: consolidated(path) for name, path in last.items()}
    for name, value in whole["killed"]["state_dict"].items():
        assert torch.equal(value, whole["undisturbed"]["state_dict"][name]), name
    assert str(whole["killed"]["optimizer_states"]) == str(whole["undisturbed"]["optimizer_states"])
