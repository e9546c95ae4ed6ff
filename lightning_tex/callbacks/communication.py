"""Logs the bytes that each collective sends."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer

from lightning_tex.parallel.activation_checkpointing import stash_bytes
from lightning_tex.parallel.byte_meter import ByteMeter


class CommunicationMonitor(Callback):
    """Log the bytes rank 0 sends per training step, by operation, axis and pass, and what recomputation stashes.

    ``sent_bytes/{operation}/{axis}/{pass}`` are means over the steps since the last logged one, by ring costs (see
    :class:`lightning_tex.parallel.byte_meter.ByteMeter`); ``stash_bytes`` is the sum over recomputed blocks of what
    their tapes keep between forward and backward.
    """

    def __init__(self) -> None:
        self._steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps = 0
        if (meter := _meter(trainer)) is not None:
            meter.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        meter = _meter(trainer)
        self._steps += 1
        if meter is None or not trainer._logger_connector.should_update_logs:
            return
        for sent, count in meter.sent_bytes().items():
            pl_module.log(f"sent_bytes/{sent.operation}/{sent.axis}/{sent.during}", count / self._steps)
        pl_module.log("stash_bytes", float(sum(stash_bytes(pl_module).values())))
        meter.clear()
        self._steps = 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (meter := _meter(trainer)) is not None:
            meter.stop()


def _meter(trainer: Trainer) -> ByteMeter | None:
    topology = getattr(trainer.strategy, "topology", None)
    return None if topology is None else topology.world.meter
