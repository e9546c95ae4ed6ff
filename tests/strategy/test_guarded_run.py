"""What the strategy does so that a run of several processes is watched."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.behaviour_modules import FOLDED, TED, PublicNames, batches, loader, own_slices
from helpers.trainers import quiet, silence
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_tex as tex
from lightning_tex.parallel.flight_record import SAVING, TRAINING
from lightning_tex.resilience.monitor import current_monitor
from lightning_tex.resilience.where import Entry
from lightning_tex.testing.ranks import run_ranks


class Evaluated(PublicNames):
    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("loss", self.loss(batch), sync_dist=True)


def watched_fit(folder: str, **options: Any) -> dict[str, Any]:
    """Two fits of two steps with validation and checkpoints: what has been written down of them."""
    silence()
    for _ in range(2):
        saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, enable_version_counter=False)
        strategy = tex.TexMoEStrategy(timeout=45, **options)
        trainer = quiet(devices=4, strategy=strategy, max_steps=2, val_check_interval=1, callbacks=[saves])
        data = loader(own_slices(trainer, batches(2)))
        trainer.fit(Evaluated(), data, data)
    groups = [group for group in dist.distributed_c10d._world.pg_map if dist.get_rank(group) >= 0]
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    return {
        "number": TRAINING.number,
        "saving": SAVING.number,
        "calls": [Entry.of(call).signature[:2] for call in TRAINING.last_calls],
        "layers": {call.layer for call in TRAINING.last_calls},
        "waits": TRAINING.waits_in,
        "timeouts": {str(backend.options._timeout) for backend in backends},
        "monitor": current_monitor() is not None,
    }


@pytest.mark.parametrize(
    "options",
    [
        TED | {"activation_checkpointing": None},
        pytest.param(FOLDED, marks=pytest.mark.full),
        pytest.param(TED | {"zero_stage": 2}, marks=pytest.mark.full),
        pytest.param(TED | {"save_distributed_checkpoint": False}, marks=pytest.mark.full),
    ],
)
def test_ranks_agree_in_the_numbers_of_their_collectives(tmp_path: Any, options: dict[str, Any]) -> None:
    seen = run_ranks(4, watched_fit_of, str(tmp_path), options)
    assert all(rank["number"] == seen[0]["number"] > 100 for rank in seen), [rank["number"] for rank in seen]
    assert all(rank["calls"] == seen[0]["calls"] for rank in seen)
    assert all(rank["saving"] == seen[0]["saving"] for rank in seen)
    assert {"embedding", "moe.router", "up", "down"} <= seen[0]["layers"]
    assert all(rank["waits"] is None and rank["monitor"] for rank in seen)
    assert all(rank["timeouts"] == {str(timedelta(seconds=48))} for rank in seen), seen[0]["timeouts"]


def watched_fit_of(folder: str, options: dict[str, Any]) -> dict[str, Any]:
    return watched_fit(folder, **options)


def test_one_process_has_no_monitor() -> None:
    (seen,) = run_ranks(1, alone)
    assert seen is False


def alone() -> bool:
    silence()
    trainer = quiet(devices=1, strategy=tex.TexMoEStrategy(), max_steps=1)
    trainer.fit(PublicNames(), loader(batches(1)))
    return current_monitor() is not None
