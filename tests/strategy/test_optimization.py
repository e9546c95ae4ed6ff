"""Optimizing: gradients, clipping, manual optimization and schedulers do on four ranks what they do on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from helpers.behaviour_modules import (
    LAYOUTS,
    DictLogger,
    PublicNames,
    assert_equal_to_one_process,
    batches,
    in_one_process,
    loader,
    new_trainer,
    on_data_axis,
)
from helpers.layout_errors import distance
from helpers.ranks import on_ranks
from helpers.trainers import gathered
from lightning.pytorch.callbacks import LearningRateMonitor
from torch import Tensor

from lightning_tex.layers import VocabParallelCrossEntropy
from lightning_tex.models import Decoder, DecoderConfig
from lightning_tex.moe import auxiliary_loss


def fit_public_names(layout: Any, **flags: Any) -> dict[str, Tensor]:
    module = PublicNames()
    trainer = new_trainer(layout, **flags)
    trainer.fit(module, on_data_axis(trainer, batches(4)))
    return gathered(module, trainer) | {"losses": module.mean_losses(trainer)}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_module_of_public_names_trains_under_both(layout: dict[str, int]) -> None:
    assert_equal_to_one_process(fit_public_names, layout=layout)


def fit_clipped_by_value(layout: Any) -> dict[str, Tensor]:
    return fit_public_names(layout, gradient_clip_val=0.01, gradient_clip_algorithm="value")


def fit_clipped_by_norm(layout: Any) -> dict[str, Tensor]:
    return fit_public_names(layout, gradient_clip_val=0.1, accumulate_grad_batches=2)


@pytest.mark.parametrize("function", [fit_clipped_by_value, fit_clipped_by_norm])
def test_gradient_clipping(function: Any) -> None:
    assert_equal_to_one_process(function)
    clipped, free = in_one_process(function), in_one_process(fit_public_names)
    assert distance(clipped["plain.weight"], free["plain.weight"]) > 1e-4, "nothing was clipped"


def fit_one_device(strategy: str) -> dict[str, Tensor]:
    module = PublicNames()
    trainer = new_trainer(None, strategy=strategy)
    trainer.fit(module, loader(batches(8)))
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_one_device_by_alias() -> None:
    (auto,), (ours,) = on_ranks(1, fit_one_device, "auto"), on_ranks(1, fit_one_device, "tex_moe")
    assert auto.keys() == ours.keys()
    assert max(distance(ours[name], auto[name]) for name in auto) <= 1e-12


class Manual(PublicNames):
    """Accumulates two batches and clips, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()


def fit_manually(layout: Any) -> dict[str, Tensor]:
    module = Manual()
    trainer = new_trainer(layout)
    trainer.fit(module, on_data_axis(trainer, batches(4)))
    return gathered(module, trainer)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_manual_optimization(layout: dict[str, int]) -> None:
    assert_equal_to_one_process(fit_manually, layout=layout)


class Scheduled(PublicNames):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit_scheduled(layout: Any) -> dict[str, Tensor]:
    module, logger = Scheduled(), DictLogger()
    trainer = new_trainer(layout, logger=logger, callbacks=[LearningRateMonitor("step")], log_every_n_steps=1)
    trainer.fit(module, on_data_axis(trainer, batches(4)))
    rates = torch.tensor([value for name, value in logger.logged if name == "lr-SGD"])
    return gathered(module, trainer) | {"rates": trainer.strategy.broadcast(rates)}


def test_scheduler_acts_on_the_sharded_optimizer_and_the_monitor_sees_it() -> None:
    assert_equal_to_one_process(fit_scheduled)
    assert in_one_process(fit_scheduled)["rates"].tolist() == pytest.approx([0.2, 0.1, 0.05, 0.025])


# --- against torch alone


@pytest.mark.full
def test_fifty_steps_on_one_process_are_torchs() -> None:
    for precision, tolerance in (("64-true", 1e-10), ("32-true", 1e-5)):
        (ours,), (theirs,) = (on_ranks(1, quickstart_run, layout, precision) for layout in ({}, None))
        torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=0)
        assert ours[0][-1] < ours[0][0]
        worst = {key: distance(ours[1][key], value) for key, value in theirs[1].items()}
        assert max(worst.values()) <= tolerance, max(worst, key=worst.get)


class Quickstart(L.LightningModule):
    """The quickstart's model, of a smaller vocabulary, on shorter sequences."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        recipe = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "quickstart.yaml").read_text())
        config = DecoderConfig(vocab_size=512, **recipe["model"]["init_args"]["config"])
        self.decoder, self.cross_entropy = Decoder(config), VocabParallelCrossEntropy()
        self.losses: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.cross_entropy(self.decoder(batch[0]), batch[1]) + auxiliary_loss(self)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
        warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=60)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}


def quickstart_run(layout: Any, precision: str) -> tuple[Tensor, dict[str, Tensor]]:
    module = Quickstart()
    trainer = new_trainer(layout, precision=precision, gradient_clip_val=1.0)
    trainer.fit(module, on_data_axis(trainer, batches(50, samples=4)))
    return torch.stack(module.losses), {name: p.detach().clone() for name, p in module.named_parameters()}
