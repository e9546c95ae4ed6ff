"""Modules with data of their own that do not train alike on every layout."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_tex.layers import ColumnParallelLinear, RowParallelLinear


class Base(L.LightningModule):
    """A column and a row layer, and random numbers to fit."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = ColumnParallelLinear(8, 16), RowParallelLinear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x))).squeeze(-1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])


class Numbers(L.LightningDataModule):
    """Random vectors and targets; batches are of all data ranks together."""

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        data = TensorDataset(torch.randn(32, 8, generator=generator), torch.randn(32, generator=generator))
        share = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        sampler = DistributedSampler(data, shuffle=False, **share)
        return DataLoader(data, batch_size=8 // share["num_replicas"], sampler=sampler)


class PlainLinearBetween(Base):
    """Weights of its own where ranks hold different features."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.mix(self.up(x))).squeeze(-1)


class SummedOverRanks(Base):
    """A loss that grows with the number of ranks."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * self.trainer.strategy.world_size


class Broken(Base):
    """Fails wherever it trains."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise ZeroDivisionError("broken")
