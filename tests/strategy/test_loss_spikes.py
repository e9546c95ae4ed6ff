"""A loss that jumps on one data rank: the same decision on all ranks, and what comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoint_runs import Data, Model
from helpers.trainers import quiet, silence
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_tex import TexMoEStrategy
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.resilience.spikes import SpikeRule
from lightning_tex.saving import latest
from lightning_tex.testing.ranks import run_ranks

SPIKE = 7  # the step, counted from 0
RULE = SpikeRule(window=5, least=3)


class Jumps(Model):
    """The loss of one data rank is a hundred times as large in one step."""

    def __init__(self) -> None:
        super().__init__()
        self.after: list[Tensor] = []
        self.batches: list[list[int]] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.batches.append(batch[0].flatten().tolist())
        loss = super().training_step(batch, index)
        return loss * 100 if self.trainer.global_step == SPIKE and self.trainer.global_rank == 1 else loss

    def on_train_batch_start(self, *_: Any) -> None:
        self.after.append(torch.cat([p.detach().flatten().clone() for p in self.parameters()]))


def fit(folder: str, action: Any) -> dict[str, Any]:
    silence()
    module = Jumps()
    strategy = TexMoEStrategy(on_spike=action, spike_rule=RULE)
    saves = [ModelCheckpoint(folder, "{step}", every_n_train_steps=5)] if action == "rewind" else []
    trainer = quiet(
        devices=2, strategy=strategy, max_steps=10, max_epochs=-1, use_distributed_sampler=False, callbacks=saves
    )
    trainer.fit(module, Data(10))
    return {
        "states": module.after,
        "batches": module.batches,
        "lr": module.learning_rates,
        "seen": int(module.seen),
        "steps": trainer.global_step,
    }


def fits(folder: str) -> dict[str, Any]:
    return {action: fit(f"{folder}/{action}", action) for action in ("warn", "skip", "rewind")}


def test_the_step_is_left_out_or_taken_back_on_all_ranks_alike(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = run_ranks(2, fits, str(tmp_path))
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lightning_tex: the loss of")]
    assert len(said) == 3 and all(f"step {SPIKE + 1} is a spike" in line for line in said), said
    assert latest(tmp_path / "rewind") is not None
    for own in runs:
        warned, skipped, rewound = own.values()
        for run in (skipped, rewound):
            assert run["lr"] == warned["lr"] and run["steps"] == 10
            assert run["batches"] == warned["batches"], "data go on"
            for before, after in zip(warned["states"][: SPIKE + 1], run["states"][: SPIKE + 1], strict=True):
                assert torch.equal(before, after)
        assert not torch.equal(warned["states"][SPIKE], warned["states"][SPIKE + 1])
        assert torch.equal(skipped["states"][SPIKE], skipped["states"][SPIKE + 1])
        assert not torch.equal(skipped["states"][SPIKE + 1], skipped["states"][SPIKE + 2])
        assert torch.equal(rewound["states"][5], rewound["states"][SPIKE + 1]), "as the checkpoint of step 5 has it"
        assert rewound["seen"] == warned["seen"] - 3, "a buffer, too"


def test_what_is_not_legal() -> None:
    with pytest.raises(UserValueError, match="on_spike='stop'; legal: None, 'warn', 'skip', 'rewind'"):
        TexMoEStrategy(on_spike="stop")  # type: ignore[arg-type]
    with pytest.raises(UserValueError, match="spike_rule has no effect"):
        TexMoEStrategy(spike_rule=RULE)
    with pytest.raises(UserValueError, match="save_distributed_checkpoint"):
        TexMoEStrategy(on_spike="rewind", save_distributed_checkpoint=False)
