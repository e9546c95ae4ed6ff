"""Fits for :mod:`helpers.stops`; as a script: an incident as JSON, and the seconds that a step takes at least."""

from __future__ import annotations

import json
import os
import sys
import warnings
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_tex as tex
from helpers.behaviour_modules import PublicNames, batches, loader, own_slices
from helpers.signalled_runs import Slow
from helpers.stops import Incident
from helpers.trainers import quiet, silence


class Validated(PublicNames):
    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.loss(batch)


class Launched(tex.TexMoEStrategy):
    """Tells an incident that the processes exist, and do not know each other yet."""

    incident: Incident | None = None

    def setup_environment(self) -> None:
        if self.incident is not None:
            self.incident.early("launch", self.global_rank)
        super().setup_environment()


def fit(
    incident: dict[str, Any] | None,
    timeout: float = 60.0,
    callbacks: tuple[Any, ...] = (),
    workers: int = 0,
    **flags: Any,
) -> None:
    """Eight steps on four ranks, tensor 2 x expert 2; a checkpoint and a validation after every second one."""
    silence()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    happens = Incident(**incident) if incident else None
    if happens is not None:
        happens.early("start", int(os.environ.get("LOCAL_RANK", 0)))
    strategy = Launched(
        tensor_parallel_size=2, expert_parallel_size=2, timeout=timedelta(seconds=timeout), check_memory=False
    )
    strategy.incident = happens
    saves = ModelCheckpoint("checkpoints", "{step}", every_n_train_steps=2, save_top_k=-1)
    module = Validated()
    trainer = quiet(
        devices=4,
        strategy=strategy,
        max_steps=8,
        val_check_interval=2,
        limit_val_batches=2,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[saves, *callbacks, *([happens] if happens else [])],
        **flags,
    )
    data = loader(own_slices(trainer, batches(8)), workers)
    trainer.fit(module, data, data)
    print(f"rank {os.environ.get('LOCAL_RANK')} is done")


if __name__ == "__main__":
    fit(json.loads(sys.argv[1]), callbacks=tuple(map(Slow, map(float, sys.argv[2:]))))
