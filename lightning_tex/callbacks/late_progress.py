"""Values in the progress bar that no step waits for."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_tex.parallel.host_copy import HostCopy


class LateProgress(Callback):
    """Show logged values in the progress bar when they have arrived from the device, usually a step late.

    What is logged with ``prog_bar=True`` Lightning reads after every batch, drawn or not, and so waits for the GPU to
    finish it. Log it without, and name it here.

    Args:
        names: of values that :meth:`LightningModule.log` gets in training steps.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._on_their_way: deque[tuple[str, HostCopy]] = deque()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._on_their_way.clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.progress_bar_callback:
            return
        logged = trainer.callback_metrics
        for name in self.names:
            value = logged.get(name)
            if isinstance(value, Tensor):
                self._on_their_way.append((name, HostCopy(value)))
        while self._on_their_way and self._on_their_way[0][1].arrived:
            name, copy = self._on_their_way.popleft()
            trainer.progress_bar_metrics[name] = copy.numbers()[0]
