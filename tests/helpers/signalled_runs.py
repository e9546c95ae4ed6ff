"""Fits whose ranks send themselves signals at chosen points, and what goes on from what they leave."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, Timer

from helpers.behaviour_modules import PublicNames, batches, loader, new_trainer, own_slices
from helpers.checkpoint_runs import fit, mean_over_data
from lightning_tex.strategy.stopping import StoppedTogether

POINTS = ("forward", "backward", "optimizer", "validation", "save")
# As many chunks on several hosts as on one: their sums differ by rounding.
ALIKE = {"tile_size": 256, "expert_chunks": 1}
LAYOUTS: dict[int, dict[str, Any]] = {
    1: {},
    2: {"expert_parallel_size": 2, **ALIKE},
    4: {"tensor_parallel_size": 2, "expert_parallel_size": 2, **ALIKE},
}
RANDOM = {"dropout": 0.1, "noise": True}
EPOCHS = 2
STEPS = 12  # six in an epoch


class Signals(L.Callback):
    """Sends this process signals at a point of a step.

    Args:
        point: one of ``POINTS``.
        step: optimizer steps done by then.
        numbers: of the signals, in this order.
    """

    def __init__(self, point: str, step: int, numbers: list[int]) -> None:
        self.point, self.step, self.numbers = point, step, numbers

    def _at(self, point: str, trainer: L.Trainer) -> None:
        if point == self.point and trainer.global_step >= self.step:
            numbers, self.numbers = self.numbers, []
            for number in numbers:
                os.kill(os.getpid(), number)
                torch.ones(1).add_(1)  # Python runs handlers between two of its own instructions

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._at("forward", trainer)

    def on_after_backward(self, trainer: L.Trainer, *_: Any) -> None:
        self._at("backward", trainer)

    def on_before_zero_grad(self, trainer: L.Trainer, *_: Any) -> None:
        self._at("optimizer", trainer)

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._at("validation", trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        self._at("save", trainer)


class Losses(L.Callback):
    """Keeps a module's losses where they outlive a fit that does not return."""

    def __init__(self) -> None:
        self.module: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.module = pl_module


def stopped_fit(folder: str, ranks: list[int], point: str, step: int, numbers: list[int], **options: Any) -> Any:
    """A fit in which some ranks get signals: exit code, losses of the global batches, checkpoints left.

    The code is 0 for a fit that returned.
    """
    hit = int(os.environ.get("RANK", 0)) in ranks
    kept = Losses()
    # On every rank: hooks that callbacks have decide what a step does.
    callbacks = [kept, saves(folder), Signals(point, step, numbers if hit else [])]
    devices = int(os.environ.get("WORLD_SIZE", 1))
    code: Any = 0
    try:
        fit(LAYOUTS[devices], devices, EPOCHS, model=RANDOM, callbacks=callbacks, **{**VALIDATES, **options})
    except StoppedTogether as stop:
        code = stop.code
    before = signal.getsignal(signal.SIGTERM)
    return {
        "code": code,
        "losses": mean_over_data(kept.module.losses),
        "restored": before is signal.SIG_DFL,
        "left": sorted(entry.name for entry in Path(folder).iterdir() if not entry.name.startswith(".")),
    }


def saves(folder: str) -> ModelCheckpoint:
    """Keeps the newest checkpoint of every fifth step."""
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=5, monitor="step", mode="max", save_top_k=1)


def resumed_fit(folder: str, path: str | None = None, **options: Any) -> Any:
    """A fit that goes on from a checkpoint, under another seed; from none, under the seed of the others."""
    devices = int(os.environ.get("WORLD_SIZE", 1))
    seed = 5 if path is None else 6
    options = {**VALIDATES, "callbacks": [saves(folder)], **options}
    return fit(LAYOUTS[devices], devices, EPOCHS, path, model=RANDOM, seed=seed, **options)


# Validation in the middle of an epoch and at its end.
VALIDATES: dict[str, Any] = {"limit_val_batches": 3, "val_check_interval": 2, "epoch_steps": STEPS // EPOCHS}


class Slow(L.Callback):
    """Lets every step take at least some seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        time.sleep(self.seconds)


class TimePasses(L.Callback):
    """In the second batch of the second validation a rank's clock says that the time is up.

    Args:
        rank: whose.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_validation_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == 4 and batch_idx == 1:
            for timer in (callback for callback in trainer.callbacks if isinstance(callback, Timer)):
                timer._offset += timer._duration


def timed_fit(folder: str, seconds: float, slow: L.Callback) -> Any:
    """A fit with a limit of time: losses, and batches that were validated."""
    kept, devices = Losses(), int(os.environ["WORLD_SIZE"])
    fit(
        LAYOUTS[devices],
        devices,
        EPOCHS,
        model=RANDOM,
        callbacks=[kept, saves(folder), slow],
        max_time={"seconds": seconds},
        **VALIDATES,
    )
    validated = kept.module.trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.completed
    return {"losses": mean_over_data(kept.module.losses), "validated": validated}


def stopped_evaluation(stage: str) -> tuple[Any, int]:
    """A test or prediction in which the second rank gets SIGTERM: exit code, and batches it has begun."""
    begun = 0

    class Signalled(PublicNames):
        def _step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            nonlocal begun
            begun += 1
            if batch_idx == 2 and self.trainer.global_rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return self.loss(batch)

        test_step = predict_step = validation_step = _step

    trainer = new_trainer({})
    try:
        getattr(trainer, stage)(Signalled(), loader(own_slices(trainer, batches(6))))
    except StoppedTogether as stop:
        return stop.code, begun
    return 0, begun


def slurm_fit(folder: str, rank_signalled: int, **options: Any) -> Any:
    """A fit as two nodes in a SLURM job, one of whose ranks may get SLURM's signal in the fourth step."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    tasks = world // 2
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
        os.environ.pop(name)
    os.environ.update(
        SLURM_JOB_ID="4711",
        SLURM_JOB_NAME="train",
        SLURM_NODELIST="localhost,elsewhere",
        SLURM_NNODES="2",
        SLURM_NTASKS=str(world),
        SLURM_NTASKS_PER_NODE=str(tasks),
        SLURM_PROCID=str(rank),
        SLURM_NODEID=str(rank // tasks),
        SLURM_LOCALID=str(rank % tasks),
        PATH=f"{folder}:{os.environ['PATH']}",
    )
    kept = Losses()
    numbers = [signal.SIGUSR1] if rank == rank_signalled else []
    callbacks = [kept, saves(folder), Signals("backward", 3, numbers)]
    result, code = {}, 0
    try:
        more = {"default_root_dir": folder, "num_nodes": 2, **VALIDATES, **options}
        result = fit(LAYOUTS[world], tasks, EPOCHS, model=RANDOM, callbacks=callbacks, **more)
    except StoppedTogether as stop:
        code = stop.code
    return {"code": code, "losses": mean_over_data(kept.module.losses), "own": result.get("own")}
