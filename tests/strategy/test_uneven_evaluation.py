"""Validation, test, predict and logs on four ranks, unequal numbers of batches, several stages of one trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.behaviour_modules import (
    FOLDED,
    TED,
    PublicNames,
    Unequal,
    assert_equal_to_one_process,
    batches,
    in_one_process,
    loader,
    new_trainer,
    on_data_axis,
)
from helpers.ranks import on_ranks
from helpers.trainers import gathered
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric


class Evaluates(PublicNames):
    """Remembers what it saw, and logs means over samples."""

    def __init__(self) -> None:
        super().__init__()
        self.metric = MeanMetric()
        self.seen = 0

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.seen += 1
        losses = F.cross_entropy(self.whole_logits(batch[0]).flatten(0, 1), batch[1].flatten())
        self.log("loss", losses, sync_dist=True, batch_size=len(batch[0]))
        self.metric.update(losses, weight=len(batch[0]))
        self.log("metric", self.metric)

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.whole_logits(batch[0])


def fit_with_validation(layout: Any) -> dict[str, Tensor]:
    module = Evaluates()
    trainer = new_trainer(layout, val_check_interval=2)
    data = on_data_axis(trainer, batches(6))
    trainer.fit(module, data, on_data_axis(trainer, batches(2, seed=5)))
    metrics = {name: trainer.callback_metrics[name] for name in ("loss", "metric")}
    return gathered(module, trainer) | metrics | {"seen": torch.tensor(module.seen)}


def test_validation_in_the_middle_of_training() -> None:
    assert_equal_to_one_process(fit_with_validation)


def evaluate_unequal(layout: Any, iterable: bool, limit: int | None) -> dict[str, Any]:
    module = Evaluates()
    limits = {} if limit is None else {f"limit_{stage}_batches": limit for stage in ("val", "test", "predict")}
    trainer = new_trainer(layout, **limits)
    everything = batches(5, samples=2)
    # Data rank 0 has batches 0 to 3, data rank 1 only batch 4.
    rank = trainer.distributed_sampler_kwargs["rank"] if layout else None
    own = everything if rank is None else everything[:4] if rank == 0 else everything[4:]
    given = DataLoader(Unequal(own), batch_size=None) if iterable else loader(own)
    found: dict[str, Any] = {}
    for stage in ("validate", "test"):
        (found[stage],) = getattr(trainer, stage)(module, given, verbose=False)
    predictions = trainer.predict(module, given)
    found["predictions"] = torch.cat(predictions)
    found["count"] = len(predictions)
    return found


# A limit above what some of the ranks have, which Lightning takes for the length of what has none.
@pytest.mark.parametrize(
    ("layout", "iterable", "limit"),
    [
        pytest.param(layout, iterable, limit, id=f"{name}-{data}", marks=[] if name in default else pytest.mark.full)
        for name, layout in (("ted", TED), ("folded", FOLDED))
        for data, iterable, limit, default in (
            ("sampler", False, None, ("ted", "folded")),
            ("iterable", True, None, ("folded",)),
            ("limited iterable", True, 5, ("ted",)),
        )
    ],
)
def test_evaluation_with_unequal_numbers_of_batches(layout: dict[str, int], iterable: bool, limit: int | None) -> None:
    reference = in_one_process(evaluate_unequal, iterable, limit)
    parts = {0: reference["predictions"][:8], 1: reference["predictions"][8:]}
    for rank, found in enumerate(on_ranks(4, evaluate_unequal, layout, iterable, limit)):
        assert found["count"] == (4, 1)[rank // 2]
        torch.testing.assert_close(found["predictions"], parts[rank // 2], rtol=1e-10, atol=1e-10)
        for stage in ("validate", "test"):
            for name, value in reference[stage].items():
                assert found[stage][name] == pytest.approx(value, rel=1e-10), (rank, stage, name)


def fit_test_fit(layout: Any) -> dict[str, Tensor]:
    module = Evaluates()
    trainer = new_trainer(layout)
    data = on_data_axis(trainer, batches(4))
    trainer.fit(module, data)
    (tested,) = trainer.test(module, data, verbose=False)
    trainer.fit_loop.max_epochs += 1
    trainer.fit(module, data)
    steps = torch.tensor(trainer.global_step)
    return gathered(module, trainer) | {"tested": torch.tensor(tested["loss"]), "steps": steps}


@pytest.mark.parametrize("layout", [TED, FOLDED], ids=["ted", "folded"])
def test_fit_then_test_then_fit_again(layout: dict[str, int]) -> None:
    assert_equal_to_one_process(fit_test_fit, layout=layout)


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
