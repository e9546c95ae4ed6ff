"""Logged values and metrics count every sample once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.behaviour_modules import TED, PublicNames, batches, new_trainer, on_data_axis, on_ranks
from torch import Tensor
from torchmetrics import MeanMetric


class Logs(PublicNames):
    def __init__(self) -> None:
        super().__init__()
        self.metric = MeanMetric()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        number = batch[0].sum().double()
        self.log("mean", number, sync_dist=True, on_step=False, on_epoch=True, batch_size=len(batch[0]))
        self.log("sum", number, sync_dist=True, reduce_fx="sum", on_step=False, on_epoch=True)
        self.log("max", number, sync_dist=True, reduce_fx="max", on_step=False, on_epoch=True)
        self.metric.update(batch[0].double())
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("metric", self.metric.compute())
        self.metric.reset()


def fit_logging(layout: Any) -> dict[str, Tensor]:
    module = Logs()
    trainer = new_trainer(layout)
    data = batches(8)
    trainer.fit(module, on_data_axis(trainer, data))
    return {name: trainer.callback_metrics[name] for name in ("mean", "sum", "metric", "max")}


def test_logged_values_count_every_sample_once() -> None:
    ids = torch.cat([batch[0] for batch in batches(8)]).double()
    halves = ids.view(8, 2, 4, -1).sum((2, 3))  # [batch, data rank]
    for values in on_ranks(4, fit_logging, TED):
        assert float(values["sum"]) == pytest.approx(float(ids.sum()))
        assert float(values["mean"]) == pytest.approx(float(halves.mean()))
        assert float(values["max"]) == float(halves.max())
        assert float(values["metric"]) == pytest.approx(float(ids.mean()))
