"""A module that learns a few batches by heart, whose gradients can be spoilt."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from helpers.behaviour_modules import FOLDED, TED, PublicNames, batches, new_trainer, on_data_axis

LAYOUTS = {"ted": TED, "folded": FOLDED, "sequence": {**TED, "sequence_parallel": True}}


class Learns(PublicNames):
    """Learns a few batches by heart. ``spoil``: (rank, step) -> what the gradient of ``where`` is multiplied by."""

    def __init__(self, spoil: dict[tuple[int, int], float] | None = None, where: str = "norm.weight") -> None:
        super().__init__()
        self.spoil, self.where = spoil or {}, where
        self.backwards = 0

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=6e-3)

    def on_before_backward(self, loss: Tensor) -> None:
        factor = self.spoil.get((self.trainer.global_rank, self.backwards))
        self.backwards += 1
        if factor is not None:
            handle = self.get_parameter(self.where).register_hook(lambda grad: (handle.remove(), grad * factor)[1])


def fitted(module: L.LightningModule, layout: Any, steps: int = 8, **flags: Any) -> L.Trainer:
    trainer = new_trainer(layout, **flags)
    # Of a length that a tensor axis of 2 divides.
    given = [[part.repeat(1, 2)[:, :6] for part in batch] for batch in batches(2, samples=8)]
    trainer.fit(module, on_data_axis(trainer, given * (steps // 2)))
    return trainer
