"""The validation loss of each source of a mixture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor


class SourceLosses(Callback):
    """Log ``val_loss/{source}``, nats per token over all ranks, where validation batches say which source they are of.

    A batch does by ``source``, its name, as those of a :class:`~lightning_tex.MixtureDataModule`: all ranks' batches of
    one number are of one source. The module's ``validation_step`` gives ``loss_sum`` and ``tokens`` of the batch.
    """

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sums: dict[str, Tensor] = {}

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        source = batch.get("source") if isinstance(batch, Mapping) else None
        if isinstance(source, str) and isinstance(outputs, Mapping):
            sums = torch.stack([outputs["loss_sum"].double(), outputs["tokens"].double()])
            self._sums[source] = self._sums.get(source, 0) + sums

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._sums:
            return
        sums = trainer.strategy.reduce(torch.stack(list(self._sums.values())), reduce_op="sum")
        assert isinstance(sums, Tensor)
        for source, (total, tokens) in zip(self._sums, sums.unbind(), strict=True):
            pl_module.log(
                f"val_loss/{source}", (total / tokens.clamp(min=1)).float(), sync_dist=True
            )  # or Lightning warns
