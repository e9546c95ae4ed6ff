"""Fits in which something becomes infinite or NaN on one rank, from some step on."""

from __future__ import annotations

import json
import os
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from helpers.checkpoint_runs import Data, Model
from helpers.trainers import quiet, silence
from lightning_tex import TexMoEStrategy
from lightning_tex.cli.main import main

LAYOUT = {"tensor_parallel_size": 2, "expert_parallel_size": 2}


class Spoilt(Model):
    """Something is NaN from a step on, on one rank.

    Args:
        what: ``loss``; ``expert``, ``router``: a weight; ``activation``: what the first norm gives; ``gradient``: what
            a backward hook gives; ``nothing``.
        rank: where.
        first, last: in which steps, counted from 0; what is written to weights stays.
    """

    def __init__(self, what: str, rank: int, first: int, last: int) -> None:
        super().__init__(dropout=0.1)
        self.save_hyperparameters()
        self.what, self.rank, self.first, self.last = what, rank, first, last
        self.decoder.norm.register_forward_hook(self._spoil)

    def _acts(self, what: str) -> bool:
        step = self.trainer.global_step
        here = self.trainer.global_rank == self.rank and self.first <= step <= self.last
        return self.what == what and here and self.trainer.training

    def _spoil(self, module: Any, inputs: Any, output: Tensor) -> Tensor:
        if self._acts("gradient"):
            output.register_hook(lambda gradient: gradient * float("nan"))
        return output * float("inf") if self._acts("activation") else output

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        _, moe = next(self.decoder.moe_layers())
        with torch.no_grad():
            if self._acts("expert"):
                moe.experts.up[-1, 0, 0] = float("nan")
            if self._acts("router"):
                moe.router.weight[0, 0] = float("nan")
        loss = super().training_step(batch, index)
        return loss + float("nan") if self._acts("loss") else loss


def spoilt_fit(
    folder: str, spoilt: tuple[Any, ...], steps: int, scale: float | None = None, **options: Any
) -> dict[str, Any]:
    """A fit on this rank's world: what it ended with. ``scale``: of the loss, under 16-mixed; ``None``: 32-true."""
    silence()
    module = Spoilt(*spoilt)
    world = int(os.environ.get("WORLD_SIZE", 1))
    layout = LAYOUT if world == 4 else {}
    scaled = [] if scale is None else [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))]
    strategy = TexMoEStrategy(**{**layout, "check_replicas_every_n_steps": 0, **options})
    callbacks = [ModelCheckpoint(folder, "{step}", every_n_train_steps=100, save_last=False)]
    trainer = quiet(
        devices=world,
        strategy=strategy,
        max_steps=steps,
        use_distributed_sampler=False,
        callbacks=callbacks,
        plugins=scaled,
    )
    said = None
    try:
        trainer.fit(module, Data(3))
    except RuntimeError as error:
        said = str(error)
    skipped = strategy.tiled_optimizer.skipped.total if strategy.tiled_optimizer else None
    return {"said": said, "skipped": skipped, "losses": module.losses}


def replayed(dump: str) -> dict[str, Any] | None:
    """What ``lightning-tex replay`` reports, called on every rank as torchrun would."""
    silence()
    with redirect_stdout(StringIO()) as out:
        main(["replay", dump, "--json"])
    lines = out.getvalue().splitlines()
    return json.loads(lines[-1]) if lines else None
