"""Tokens per second."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Log ``tokens_per_second``: tokens of all data ranks per second of training since the last logged step.

    Time in validation and checkpoint saving does not count. Tokens are those of ``batch["input_ids"]``.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._tokens, self._seconds, self._started = 0, 0.0, 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            return
        logged = trainer._logger_connector.should_update_logs
        if logged and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)  # the time of queued kernels belongs to these steps
        self._tokens += batch["input_ids"].numel()
        self._seconds += time.perf_counter() - self._started
        if logged:
            tokens = torch.tensor(float(self._tokens), device=pl_module.device)
            tokens = trainer.strategy.reduce(tokens, reduce_op="sum").cpu()  # the progress bar reads it every time
            pl_module.log("tokens_per_second", tokens / max(self._seconds, 1e-9), prog_bar=True)
            self._tokens, self._seconds = 0, 0.0
