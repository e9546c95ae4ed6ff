"""Steps on a GPU that are not finite: not taken, told a step later by the right name, and the end of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.checkpoint_runs import Data
from helpers.nonfinite_runs import Spoilt
from helpers.on_a_gpu import ACCELERATOR, FIRST_SCALE, IS_GPU, one_rank
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_tex import TexMoEStrategy
from lightning_tex.strategy.step_dump import Dump


def run(
    folder: Path, spoilt: tuple[Any, ...], steps: int, precision: str = "32-true", **strategy: Any
) -> tuple[str, TexMoEStrategy, L.Trainer]:
    """What it ended with, the strategy, the Trainer."""
    checkpoints = ModelCheckpoint(folder, "{step}", every_n_train_steps=100, save_last=False)
    options = {"check_replicas_every_n_steps": 0, **strategy}
    trainer = one_rank(
        ACCELERATOR, options, max_steps=steps, max_epochs=-1, precision=precision, callbacks=[checkpoints]
    )
    said = ""
    try:
        trainer.fit(Spoilt(*spoilt), Data(3))
    except RuntimeError as error:
        said = str(error)
    return said, trainer.strategy, trainer


ORIGINS = {
    "expert": r"output of expert \d of \S+experts \(Experts\) on rank\(s\) 0, whose parameter \S+up of expert 3",
    "router": r"whose parameter \S+router.weight is not finite",
    "activation": r"output of decoder.norm \(\w+\) on rank\(s\) 0;",
    "loss": r"the loss on rank\(s\) 0; batch \d of data rank 0",
    "gradient": r"gradient at the output of decoder.norm \(RMSNorm\) on rank\(s\) 0;",
}


@pytest.mark.parametrize("what", ORIGINS)
def test_the_end_names_step_and_origin(what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said, strategy, _ = run(tmp_path, (what, 0, 2, 99), 12, max_skipped_steps=3)
    assert re.search(ORIGINS[what], said), said or "the run did not end with an error"
    assert "each of the last 3 steps" in said and "in step 5" in said, said
    assert strategy.tiled_optimizer.skipped.total == 3, strategy.tiled_optimizer.skipped
    messages = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lightning_tex: step")]
    assert [line.split()[2] for line in messages] == ["3", "4", "5"], messages
    dump = Dump.read(tmp_path / "nonfinite-step=5")
    assert dump.about["step"] == 5 and dump.about["steps_done"] in (5, 6), json.dumps(dump.about)
    assert len(dump.batches(0)) == 1


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_one_step_is_left_out_and_nothing_else_changes(precision: str, tmp_path: Path) -> None:
    said, strategy, trainer = run(tmp_path, ("loss", 0, 2, 2), 5, precision)
    assert not said, said
    assert trainer.global_step == 5 and strategy.tiled_optimizer.skipped.total == 1, strategy.tiled_optimizer.skipped
    assert all(bool(p.isfinite().all()) for p in trainer.lightning_module.parameters())
    if precision == "16-mixed" and IS_GPU:  # on CPU Lightning takes bf16-mixed instead
        scale = trainer.precision_plugin.scaler.get_scale()
        assert scale == FIRST_SCALE / 2, f"the loss scale is {scale} after one step that was left out"


def test_the_last_step_of_a_run_counts(tmp_path: Path) -> None:
    said, _, _ = run(tmp_path, ("loss", 0, 2, 99), 4, max_skipped_steps=2)
    assert "each of the last 2 steps" in said and "in step 4" in said, said or "the run ended without an error"


def test_steps_without_a_guard_are_taken(tmp_path: Path) -> None:
    said, strategy, trainer = run(tmp_path, ("activation", 0, 2, 2), 4, max_skipped_steps=None)
    assert not said and strategy.tiled_optimizer.skipped.total == 0
    assert not all(bool(torch.isfinite(p).all()) for p in trainer.lightning_module.parameters())
