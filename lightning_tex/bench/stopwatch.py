"""Timing and counting of whole training steps, by a callback."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from lightning_tex.bench.moments import synchronise
from lightning_tex.parallel.activation_checkpointing import stash_bytes
from lightning_tex.parallel.collectives import all_reduce
from lightning_tex.strategy import TexMoEStrategy


@dataclass
class Measured:
    """What one run showed. Times are per optimizer step.

    Args:
        step_ms: wall time.
        cpu_ms: processor time of all ranks together.
        sent_bytes: by (operation, axis, pass), of rank 0 in one step.
        stash_bytes: by recomputed block, of rank 0.
        loss: of the last step, mean over the data axis.
    """

    step_ms: float
    cpu_ms: float
    sent_bytes: dict[str, float] = field(default_factory=dict)
    stash_bytes: dict[str, int] = field(default_factory=dict)
    loss: float = float("nan")


class Stopwatch(Callback):
    """Counts the bytes of the last warm-up step, then times the rest.

    Args:
        warmup: steps before the clock starts, at least 1.
        steps: steps that are timed together.
    """

    def __init__(self, warmup: int, steps: int) -> None:
        self.warmup, self.steps = max(1, warmup), steps
        self.measured: Measured | None = None
        self._loss: Any = None
        self._sent: dict[str, float] = {}
        self._stash: dict[str, int] = {}
        self._start = (0.0, 0.0)
        self._steps_seen = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.warmup - 1:
            meter = TexMoEStrategy.of(trainer).topology.world.meter
            if meter is not None and not meter.counting:
                meter.start()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        self._loss = loss.detach()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._steps_seen:  # inside an accumulation
            return
        self._steps_seen = trainer.global_step
        if trainer.global_step == self.warmup:
            meter = TexMoEStrategy.of(trainer).topology.world.meter
            if meter is not None:
                self._sent = {"/".join(kind): count for kind, count in meter.sent_bytes().items()}
                meter.stop()
            self._stash = stash_bytes(pl_module)
            self._start = self._now(trainer)
        elif trainer.global_step == self.warmup + self.steps:
            wall, cpu = (end - start for end, start in zip(self._now(trainer), self._start, strict=True))
            strategy = TexMoEStrategy.of(trainer)
            cpus = all_reduce(torch.tensor(cpu, device=strategy.root_device), strategy.topology.world)
            loss = strategy.reduce(self._loss.double(), reduce_op="mean") * trainer.accumulate_grad_batches
            per_step = 1000 / self.steps
            self.measured = Measured(wall * per_step, float(cpus) * per_step, self._sent, self._stash, float(loss))

    def _now(self, trainer: Trainer) -> tuple[float, float]:
        synchronise(trainer.strategy.root_device)
        trainer.strategy.barrier()
        return time.perf_counter(), time.process_time()
