"""A fit that is ended by force and begins again: as a script under torchrun, or by its callback in a recipe."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers.checkpoint_runs import fit
from helpers.trainers import silence

WORLD = 2
LAYOUT = {"tensor_parallel_size": 2, "expert_parallel_size": 1, "tile_size": 256}


class Killed(L.Callback):
    """Ends a drawn rank by SIGKILL, at a drawn moment within three steps, in each of the first attempts.

    Args:
        attempts: in which it happens.
        seed: of the draws.
        folder: where attempts are counted.
    """

    def __init__(self, attempts: int, seed: int = 0, folder: str = ".") -> None:
        self.attempts, self.seed, self.folder = attempts, seed, Path(folder)
        self.moment: tuple[int, float] | None = None
        self.batches = 0

    def on_fit_start(self, trainer: L.Trainer, *_: Any) -> None:
        attempt = len(list(self.folder.glob("attempt.*")))
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            (self.folder / f"attempt.{attempt}").touch()
        draw = random.Random(1000 * self.seed + attempt)
        rank, batch, delay = draw.randrange(trainer.world_size), draw.randrange(3), draw.uniform(0, 0.1)
        if attempt < self.attempts and rank == trainer.global_rank:
            self.moment = batch, delay

    def on_train_batch_start(self, *_: Any) -> None:
        if self.moment is not None and self.batches == self.moment[0]:
            threading.Timer(self.moment[1], os.kill, (os.getpid(), signal.SIGKILL)).start()
        self.batches += 1


def run(folder: str, kills: int, seed: int) -> torch.Tensor:
    """Thirty steps, with a checkpoint after every second one; this rank's parameters at the end."""
    silence()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    saves = ModelCheckpoint(
        f"{folder}/checkpoints", "{step}", every_n_train_steps=2, monitor="step", mode="max", save_top_k=2
    )
    model = {"dropout": 0.1, "noise": True}
    callbacks = [saves, Killed(kills, seed, folder)]
    result = fit(LAYOUT, WORLD, 3, "auto", model=model, callbacks=callbacks, epoch_steps=10)
    return result["own"]


if __name__ == "__main__":
    own = run(".", int(sys.argv[1]), int(sys.argv[2]))
    torch.save(own, f"own.{os.environ['RANK']}")
