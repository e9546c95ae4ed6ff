"""A LightningModule of public names, data for it, and how the behaviour tests run it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_tex as tex
from helpers.layout_errors import distance
from helpers.ranks import on_ranks
from helpers.trainers import quiet
from lightning_tex.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelCrossEntropy,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from lightning_tex.models import Decoder, DecoderConfig
from lightning_tex.moe import MoE, auxiliary_loss
from lightning_tex.parallel import collectives

TED = {"tensor_parallel_size": 2, "expert_parallel_size": 2}
FOLDED = {"tensor_parallel_size": 2, "expert_parallel_size": 4, "expert_tensor_parallel_size": 1}
LAYOUTS = {"ted": TED, "folded": FOLDED, "data": {}}


class PublicNames(L.LightningModule):
    """Written as a user would, for one process."""

    def __init__(self, capacity_factor: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.norm = VocabParallelEmbedding(61, 16), nn.LayerNorm(16)
        self.moe = MoE(16, 16, num_experts=4, top_k=2, capacity_factor=capacity_factor)
        self.up, self.down = ColumnParallelLinear(16, 32), RowParallelLinear(32, 16)
        self.plain, self.head = nn.Linear(16, 16), VocabParallelHead(16, 61)
        self.cross_entropy = VocabParallelCrossEntropy()
        self.losses: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + self.moe(self.norm(x))
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(self.plain(x))

    def loss(self, batch: list[Tensor]) -> Tensor:
        loss = self.cross_entropy(self(batch[0]), batch[1]) + auxiliary_loss(self)
        self.losses.append(loss.detach())
        return loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    # For the tests alone.

    def mean_losses(self, trainer: L.Trainer) -> Tensor:
        return trainer.strategy.reduce(torch.stack(self.losses), reduce_op="mean")

    def whole_logits(self, ids: Tensor) -> Tensor:
        return collectives.all_gather(self(ids), -1, self.head.tensor)[..., : self.head.size]


class SmallDecoder(L.LightningModule):
    """A decoder with experts that keeps its losses; ``sizes`` override those of its configuration."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        usual = {"vocab_size": 61, "dim": 16, "num_layers": 2, "num_heads": 4, "hidden_dim": 24, "num_experts": 4}
        self.decoder = Decoder(DecoderConfig(**{**usual, "top_k": 2, **sizes}))
        self.cross_entropy = VocabParallelCrossEntropy()
        self.losses: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.cross_entropy(self.decoder(batch[0]), batch[1])
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class DictLogger(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[str, float]] = []

    name = "kept"
    version = 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged += metrics.items()

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Unequal(IterableDataset):
    """Yields what it was given; nobody knows how much that is."""

    def __init__(self, given: list[Any]) -> None:
        self.given = given

    def __iter__(self) -> Iterator[Any]:
        return iter(self.given)


def batches(count: int, samples: int = 8, seed: int = 0) -> list[list[Tensor]]:
    """Batches of (ids, next ids), [samples, 5] each."""
    ids = torch.randint(0, 61, (count, samples, 6), generator=torch.Generator().manual_seed(seed))
    return [[batch[:, :-1], batch[:, 1:]] for batch in ids]


def loader(given: list[list[Tensor]], workers: int = 0) -> DataLoader:
    """A data loader of ready batches; Lightning would take a bare list for a collection of loaders."""
    return DataLoader(given, batch_size=None, num_workers=workers)


def own_slices(trainer: L.Trainer, given: list[list[Tensor]]) -> list[list[Tensor]]:
    """This data rank's slice of every batch."""
    if not isinstance(trainer.strategy, tex.TexMoEStrategy):
        return given
    kwargs = trainer.distributed_sampler_kwargs
    return [[part.chunk(kwargs["num_replicas"])[kwargs["rank"]] for part in batch] for batch in given]


def on_data_axis(trainer: L.Trainer, given: list[list[Tensor]]) -> DataLoader:
    """Its loader."""
    return loader(own_slices(trainer, given))


def new_trainer(layout: dict[str, Any] | None, **flags: Any) -> L.Trainer:
    """On all ranks of this world with a layout, or ``strategy="auto"`` in one process for ``None``; fp64."""
    strategy: Any = "auto" if layout is None else tex.TexMoEStrategy(**layout)
    fixed = {"devices": int(os.environ["WORLD_SIZE"]), "strategy": strategy, "use_distributed_sampler": False}
    return quiet(**{**fixed, "max_epochs": 1, "precision": "64-true", **flags})


@cache
def in_one_process(function: Callable[..., Any], *args: Any) -> Any:
    """``function(None, *args)`` under ``strategy="auto"``, once."""
    return on_ranks(1, function, None, *args)[0]


def assert_equal_to_one_process(function: Callable[..., dict[str, Tensor]], *args: Any, layout: Any = TED) -> None:
    """``function(layout, *args)`` gives named tensors; on four ranks the same ones as under ``strategy="auto"``."""
    reference = in_one_process(function, *args)
    for rank, got in enumerate(on_ranks(4, function, layout, *args)):
        assert got.keys() == reference.keys()
        for name, value in reference.items():
            error = distance(got[name].double(), value.double())
            # torchmetrics keeps its states in fp32 whatever the module's precision is.
            tolerance = 1e-6 if value.dtype == torch.float32 else 1e-10
            assert error <= tolerance, f"rank {rank}, {name}: {error:.1e}"
