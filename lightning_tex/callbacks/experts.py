"""Logs how evenly tokens are spread over experts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from lightning_tex.parallel.expert_load import ExpertLoad
from lightning_tex.parallel.sharding import TexModule, tex_modules


class ExpertMonitor(Callback):
    """Log how evenly each MoE layer's experts are used, over the data axis and since the last logged step.

    ``expert_load/{layer}``: the most loaded expert's share of the choices times the number of experts; 1 is perfect
    balance, E is all on one. ``expert_overflow/{layer}``: the fraction of choices that overflowed their expert's
    capacity. ``{layer}`` is the block's number where the module's name has one, else the name.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._layers: dict[str, TexModule] | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer._logger_connector.should_update_logs:
            return
        if self._layers is None:
            self._layers = labelled({name: layer for name, layer in tex_modules(pl_module) if _load(layer) is not None})
        loads = {label: load.take() for label, layer in self._layers.items() if (load := _load(layer)) is not None}
        used = {
            n: self._layers[n].activation_layout.total(load.float()) for n, load in loads.items() if load is not None
        }
        if not used:
            return
        total = trainer.strategy.reduce(torch.cat(list(used.values())), reduce_op="sum")
        for label, load in zip(used, total.split([len(load) for load in used.values()]), strict=True):
            choices = load[:-1].sum().clamp(min=1)
            pl_module.log(f"expert_load/{label}", load[:-1].max() / choices * (len(load) - 1))
            pl_module.log(f"expert_overflow/{label}", load[-1] / choices)


def _load(layer: TexModule) -> ExpertLoad | None:
    """What a layer with experts counts."""
    load = getattr(layer, "load", None)
    return load if isinstance(load, ExpertLoad) else None


def labelled(layers: dict[str, TexModule]) -> dict[str, TexModule]:
    """Layers by the one number in their name where that tells them apart, else by the name."""
    numbers = {name: [part for part in name.split(".") if part.isdigit()] for name in layers}
    labels = {name: found[0] if len(found) == 1 else name for name, found in numbers.items()}
    seen = Counter(labels.values())
    return {labels[name] if seen[labels[name]] == 1 else name: layer for name, layer in layers.items()}
