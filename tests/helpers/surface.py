"""One use of Lightning in a few lines, run in one process without us and on ranks with us: a row of the surface.

A row's ``use`` gets a :class:`Use` and returns facts: tensors, numbers and words that must be the same on all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import lightning_tex as tex
from helpers.trainers import gathered, quiet
from lightning_tex.moe import MoE

BATCH, BATCHES = 4, 4
Facts = dict[str, Any]


class Small(L.LightningModule):
    """A layer of experts and one that knows nothing of them."""

    def __init__(self, experts: bool = True, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(4)
        self.plain = nn.Linear(4, 4)
        self.experts = MoE(4, 8, 4, load_balance_coefficient=0.0) if experts else nn.Linear(4, 4)
        self.lr, self.batch_size, self.seen = lr, BATCH, 0

    def forward(self, rows: Tensor) -> Tensor:
        return rows + self.experts(self.plain(rows))

    def loss(self, batch: Any) -> Tensor:
        return (self(batch[0]) - 1).square().mean()

    def training_step(self, batch: Any, _: int) -> Tensor:
        self.seen += 1
        loss = self.loss(batch)
        self.log("train_loss", loss.detach(), sync_dist=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, *_: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: Any, *_: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Any, *_: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Rows(L.LightningDataModule):
    """The same samples in the same global batches, however many ranks share them."""

    def loader(self, batches: int = BATCHES, seed: int = 0) -> DataLoader:
        rows = torch.randn(batches * BATCH, 4, generator=torch.Generator().manual_seed(seed))
        spread = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        own = BATCH // spread["num_replicas"]
        first = spread["rank"] * own
        mine = [i for batch in range(0, len(rows), BATCH) for i in range(batch + first, batch + first + own)]
        return DataLoader(Subset(TensorDataset(rows), mine), batch_size=own)

    def train_dataloader(self) -> Any:
        return self.loader()

    def val_dataloader(self) -> Any:
        return self.loader(2, seed=1)

    test_dataloader = predict_dataloader = val_dataloader


@dataclass
class Use:
    """Where a row is run.

    Args:
        world: how many processes.
        ours: by our strategy; else by Lightning's for one device.
        folder: of this run, the same on all ranks.
    """

    world: int
    ours: bool
    folder: Path
    trainers: list[L.Trainer] = field(default_factory=list)

    def trainer(self, **flags: Any) -> L.Trainer:
        strategy = tex.TexMoEStrategy() if self.ours else "auto"
        flags = {"max_epochs": 1, "num_sanity_val_steps": 0, "use_distributed_sampler": False, **flags}
        self.trainers.append(quiet(devices=self.world, strategy=strategy, default_root_dir=str(self.folder), **flags))
        return self.trainers[-1]

    def fit(self, module: L.LightningModule | None = None, data: Any = None, **flags: Any) -> Facts:
        """A fit with these flags of the Trainer: weights, steps and metrics after it."""
        module = module or Small()
        fit = self.trainer(**flags)
        fit.fit(module, data or Rows())
        return self.after(module, fit)

    def after(self, module: L.LightningModule, fit: L.Trainer) -> Facts:
        metrics = {name: value for name, value in fit.callback_metrics.items() if name.endswith("_loss")}
        return {**gathered(module, fit), **metrics, "steps": fit.global_step}


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        area: which of the table's parts it is in.
        what: of Lightning, as Markdown.
        use: runs it; ``None``: another test does.
        refused: what it says where we refuse it.
        note: what there is to know besides.
        held_by: the test, where another one holds it.
        worlds: on how many processes.
        needs: packages without which it is not run.
        alike: whether facts must be those of one process without us.
    """

    area: str
    what: str
    use: Callable[[Use], Facts | None] | None = None
    refused: str = ""
    note: str = ""
    held_by: str = ""
    worlds: tuple[int, ...] = (1, 2)
    needs: tuple[str, ...] = ()
    alike: bool = True

    @property
    def name(self) -> str:
        return f"{self.area}: {self.what}".replace("`", "")


def outcome(row: Row, world: int, ours: bool, folder: str) -> tuple[str, Any]:
    """What a row did: ``"works"`` and its facts, or ``"refused"`` and the message."""
    assert row.use is not None
    place = Path(folder, f"{row.name.translate(_PLAIN)}-{world}-{ours}")
    place.mkdir(parents=True, exist_ok=True)
    launched = dict(os.environ)
    try:
        return "works", row.use(Use(world, ours, place)) or {}
    except Exception as error:
        return "refused", f"{type(error).__name__}: {error}"
    finally:
        os.environ.update(launched)


_PLAIN = {ord(character): "_" for character in " :/,*()[]=<>\"'."}


def differences(got: Facts, expected: Facts) -> Iterator[str]:
    """What is not the same: tensors and numbers to 1e-5, all else to the letter."""
    if got.keys() != expected.keys():
        yield f"{sorted(got.keys() ^ expected.keys())} on one side only"
    for name in got.keys() & expected.keys():
        one, other = got[name], expected[name]
        if isinstance(one, (Tensor, float)):
            if not torch.allclose(torch.as_tensor(one), torch.as_tensor(other), rtol=1e-5, atol=1e-6):
                yield f"{name}: {one}, expected {other}"
        elif one != other:
            yield f"{name}: {one!r}, expected {other!r}"


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| | Lightning's | under `TexMoEStrategy` |", "|---|---|---|"]
    before = ""
    for row in rows:
        state = f"refused: *{row.refused}*" if row.refused else "works"
        said = f"{state}; {row.note}" if row.note else state
        lines.append(f"| {row.area if row.area != before else ''} | {row.what} | {said} |")
        before = row.area
    return "\n".join(lines)
