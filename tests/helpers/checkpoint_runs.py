"""A small model with everything a checkpoint must get right, and one fit of it, on one process or on ranks."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import lightning_tex as tex
from helpers.trainers import gathered, quiet
from lightning_tex.layers import VocabParallelCrossEntropy
from lightning_tex.models import Decoder, DecoderConfig

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

VOCABULARY = 61  # no tensor size divides it
BATCH = 8  # over all data ranks
EPOCH = 2  # steps
# Processes and the strategy's arguments, by name: a few layouts, ZeRO stages and both forms of checkpoints.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tensor": (2, {"tensor_parallel_size": 2}),
    "expert, ZeRO 2": (2, {"expert_parallel_size": 2, "zero_stage": 2}),
    "plain, ZeRO 0": (2, {"expert_parallel_size": 1, "zero_stage": 0, "save_distributed_checkpoint": False}),
    "TED": (4, {"tensor_parallel_size": 2, "expert_parallel_size": 2}),
}
TOLERANCE = {"32-true": 1e-5, "64-true": 1e-10}


class Model(L.LightningModule):
    """A decoder with experts, tied embeddings, a buffer, and random numbers from three generators."""

    def __init__(self, dropout: float = 0.0, noise: bool = False, seed: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.noise = noise
        config = DecoderConfig(
            vocab_size=VOCABULARY,
            dim=16,
            num_layers=2,
            num_heads=4,
            num_experts=4,
            hidden_dim=24,
            top_k=2,
            load_balance_coefficient=0.0,
            dropout=dropout,
        )
        torch.manual_seed(seed)
        self.decoder = Decoder(config)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.loss = VocabParallelCrossEntropy()
        self.losses: list[float] = []
        self.learning_rates: list[float] = []

    def _loss(self, batch: list[Tensor]) -> Tensor:
        ids, targets = batch
        return self.loss(self.decoder(ids), targets) + 0.1 * (self.scale - 2).square()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.seen += 1
        loss = self._loss(batch)
        self.losses.append(float(loss.detach()))
        self.learning_rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        self.log("train_loss", loss.detach(), sync_dist=True)
        if self.noise:
            loss = loss * (1 + 0.1 * random.random() + 0.1 * np.random.rand())  # noqa: NPY002
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val_loss", self._loss(batch), sync_dist=True)

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self.log("test_loss", self._loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=3e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.2 * step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Resumable(DataLoader):
    """Goes on in the middle of an epoch: where the Trainer stood when it saved."""

    start = 0
    trainer: L.Trainer

    def __iter__(self) -> Any:
        start, self.start = self.start, 0
        return islice(super().__iter__(), start, None)

    def state_dict(self) -> dict[str, int]:
        return {"batch": self.trainer.fit_loop.epoch_loop.batch_progress.current.processed % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["batch"]


class Data(L.LightningDataModule):
    """The same samples in the same global batches whatever the number of data ranks: ``steps`` of them."""

    def __init__(self, steps: int = EPOCH) -> None:
        super().__init__()
        self.samples = steps * BATCH

    def _loader(self) -> Resumable:
        ids = torch.randint(0, VOCABULARY, (self.samples, 7), generator=torch.Generator().manual_seed(0))
        spread = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        own = BATCH // spread["num_replicas"]
        first = spread["rank"] * own
        indices = [i for batch in range(0, self.samples, BATCH) for i in range(batch + first, batch + first + own)]
        return Resumable(Subset(TensorDataset(ids[:, :-1], ids[:, 1:]), indices), batch_size=own)

    def train_dataloader(self) -> Resumable:
        loader = self._loader()
        loader.trainer = self.trainer
        return loader

    val_dataloader = test_dataloader = _loader


def trainer(strategy: Any, devices: int, epochs: int = 1, precision: str = "32-true", **options: Any) -> L.Trainer:
    """A quiet trainer on the CPU."""
    return quiet(
        devices=devices,
        strategy=strategy,
        max_epochs=epochs,
        precision=precision,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=options.pop("limit_val_batches", 0),
        **options,
    )


def fit(
    layout: dict[str, Any] | None,
    devices: int,
    epochs: int,
    ckpt_path: str | None = None,
    save: str | None = None,
    precision: str = "32-true",
    model: dict[str, Any] | None = None,
    then: Callable[[L.Trainer, Model], Any] | None = None,
    seed: int = 5,
    callbacks: list[L.Callback] | None = None,
    epoch_steps: int = EPOCH,
    **options: Any,
) -> dict[str, Any]:
    """Fit, perhaps from a checkpoint, perhaps saving one at the end; what the run can be compared by.

    Args:
        layout: arguments of the strategy; ``None`` for ``strategy="auto"``.
    """
    L.seed_everything(seed, verbose=False)
    module = Model(**(model or {}))
    run = trainer(
        "auto" if layout is None else tex.TexMoEStrategy(**layout),
        devices,
        epochs,
        precision,
        callbacks=callbacks or [],
        **options,
    )
    run.fit(module, Data(epoch_steps), ckpt_path=ckpt_path)
    if save is not None:
        run.save_checkpoint(save)
    return {
        "losses": mean_over_data(module.losses),
        "learning_rates": module.learning_rates,
        "weights": gathered(module, run),
        "seen": int(module.seen),
        "own": torch.cat([p.detach().flatten().double() for p in module.parameters()]),
        "then": then(run, module) if then is not None else None,
    }


def mean_over_data(losses: list[float]) -> list[float]:
    """The losses of the global batches."""
    total = torch.tensor(losses, dtype=torch.float64)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
        total /= torch.distributed.get_world_size()
    return total.tolist()


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """max over parameters of ||a - b|| / ||b||."""
    assert a.keys() == b.keys()
    return max(float((a[n].double() - b[n].double()).norm() / b[n].double().norm()) for n in b)


def tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a directory, whole, but the random states, which are by rank."""
    state = _load_distributed_checkpoint(path)
    flat = {f"model.{name}": value for name, value in state["model"].items()}
    for name, states in state["optimizer_0"]["state"].items():
        flat.update({f"{name}.{key}": value for key, value in states.items()})
    return flat
