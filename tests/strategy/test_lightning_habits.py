"""What users of Lightning are used to from other strategies: whose loaders these are, and what may be asked when."""

from __future__ import annotations

import copy
import pickle
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.behaviour_modules import Unequal
from helpers.ranks import on_ranks
from helpers.trainers import quiet
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_tex as tex
from lightning_tex.moe import MoE


class Small(L.LightningModule):
    """One MoE layer; keeps what it was asked and told."""

    def __init__(self, optimizer: Callable[..., Any] = torch.optim.SGD) -> None:
        super().__init__()
        self.experts = MoE(4, 8, 4, load_balance_coefficient=0.0)
        self.make, self.batches = optimizer, 0
        self.expected: dict[str, float] = {}

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.expected["setup"] = self.trainer.estimated_stepping_batches

    def training_step(self, batch: Any, _: int) -> Tensor:
        rows = batch if isinstance(batch, Tensor) else batch["a"]
        self.batches += 1
        return self.experts(rows).square().mean()

    def validation_step(self, batch: Tensor, *_: Any) -> None:
        self.log("loss", self.experts(batch).square().mean(), sync_dist=True)

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> Any:
        self.expected["configure_optimizers"] = self.trainer.estimated_stepping_batches
        return self.make(self.parameters(), lr=0.1)


def rows(n: int, sized: bool = True) -> DataLoader:
    given = [torch.ones(2, 4)] * n
    return DataLoader(given if sized else Unequal(given), batch_size=None)


def trainer(world: int, **flags: Any) -> L.Trainer:
    flags = {"max_epochs": 1, "num_sanity_val_steps": 0, **flags}
    return quiet(devices=world, strategy=tex.TexMoEStrategy(), use_distributed_sampler=False, **flags)


def whose_loaders(world: int) -> dict[str, Any]:
    """Loaders that ranks have unequal numbers of batches from, known or not; what the Trainer shows of them."""
    fit = trainer(world)
    rank = fit.global_rank
    train, sized, endless = rows(2 + rank), rows(3), rows(2 + rank, sized=False)
    module = Small()
    fit.fit(module, train, [sized, sized])
    shown = {
        "train": fit.train_dataloader is train,
        "validation": all(ours is sized for ours in fit.val_dataloaders),
        "batches": module.batches,
        "limit": fit.num_training_batches,
        "expected": module.expected,
    }
    fit = trainer(world)
    module = Small()
    fit.fit(module, endless)
    shown |= {"endless": fit.train_dataloader is endless, "endless batches": module.batches}
    fit.validate(module, endless, verbose=False)
    shown["evaluated"] = fit.val_dataloaders is endless
    fit = trainer(world)
    parts, module = {"a": rows(1 + rank), "b": rows(4)}, Small()
    fit.fit(module, CombinedLoader(parts, "min_size"))
    shown |= {"combined": fit.train_dataloader["a"] is parts["a"], "combined batches": module.batches}
    return shown


@pytest.mark.parametrize("world", [1, 2])
def test_the_trainer_shows_the_users_own_loaders(world: int) -> None:
    for shown in on_ranks(world, whose_loaders, world):
        assert shown["train"] and shown["validation"] and shown["endless"] and shown["evaluated"] and shown["combined"]
        assert shown["batches"] == shown["limit"] == 2  # as the first rank has
        assert shown["expected"] == {"setup": 2, "configure_optimizers": 2}
        assert shown["endless batches"] == 2
        assert shown["combined batches"] == 1


def a_fraction(world: int) -> int:
    fit = trainer(world, limit_train_batches=0.5)
    module = Small()
    fit.fit(module, rows(4 if fit.global_rank else 10))
    return module.batches


def test_a_fraction_of_unequal_loaders_ends_everywhere_at_once() -> None:
    assert on_ranks(2, a_fraction, 2) == [2, 2]


def validate_several(world: int) -> str:
    fit = trainer(world)
    with pytest.raises(RuntimeError) as caught:
        fit.validate(Small(), [rows(3 - fit.global_rank), rows(2)], verbose=False)
    return str(caught.value)


def test_several_unequal_evaluation_loaders_are_refused_at_the_start() -> None:
    for said in on_ranks(2, validate_several, 2):
        assert said.startswith("evaluation data loader 0 of 2 has 3, 2 batches on ranks 0, 1")


class NoLoader(Small):
    def refuse(self) -> Any:
        raise AssertionError("is limited to nothing")

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = refuse


def limited(world: int) -> list[float]:
    none = {f"limit_{stage}_batches": 0 for stage in ("train", "val", "test", "predict")}
    fit, module = trainer(world, **none), NoLoader()
    module.setup = lambda stage: None  # type: ignore[method-assign]
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    fit.fit(module)
    fit.validate(module)
    fit.test(module)
    fit.predict(module)
    return [fit.num_training_batches, fit.global_step]


@pytest.mark.parametrize("world", [1, 2])
def test_loaders_that_are_limited_to_nothing_are_not_made(world: int) -> None:
    for _, steps in on_ranks(world, limited, world):
        assert steps == 0


class Remembering(torch.optim.SGD):
    zeroed = 0

    def zero_grad(self, *arguments: Any, **options: Any) -> None:
        type(self).zeroed += 1
        super().zero_grad(*arguments, **options)


def zeroed(world: int) -> int:
    fit = trainer(world)
    before = Remembering.zeroed
    fit.fit(Small(Remembering), rows(3))
    return Remembering.zeroed - before


@pytest.mark.parametrize("world", [1, 2])
def test_zero_grad_of_the_users_own_optimizer_is_called(world: int) -> None:
    assert on_ranks(world, zeroed, world) == [3] * world


def one_scheduler(world: int) -> list[float]:
    """An optimizer and a scheduler that were made once, in two Trainers."""
    module = Small()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.8)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    module.configure_optimizers = lambda: ([optimizer], [scheduler])  # type: ignore[method-assign]
    for _ in range(2):
        trainer(world).fit(module, rows(1))
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("world", [1, 2])
def test_an_optimizer_and_its_scheduler_serve_two_trainers(world: int) -> None:
    assert on_ranks(world, one_scheduler, world) == [[pytest.approx(0.2)]] * world


def copies(world: int) -> dict[str, Any]:
    """After a fit: what is copied and pickled works, and a copy is no part of the run."""
    fit = trainer(world, callbacks=[ModelCheckpoint(tempfile.mkdtemp(), save_last="link")])
    module = Small()
    module.setup = lambda stage: None  # type: ignore[method-assign]
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    fit.fit(module, rows(2))
    del module.setup, module.configure_optimizers
    again = pickle.loads(pickle.dumps(module))
    same = all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
    (callback,) = (c for c in copy.deepcopy(fit.callbacks) if isinstance(c, ModelCheckpoint))
    strategy = pickle.loads(pickle.dumps(tex.TexMoEStrategy(tensor_parallel_size=2)))
    threads = [thread.name for thread in threading.enumerate() if "checkpoints" in thread.name]
    return {
        "same": same,
        "mesh": again._device_mesh,
        "links": callback._link_checkpoint is ModelCheckpoint._link_checkpoint,
        "strategy": strategy.options.tensor_parallel_size,
        "trainer": type(pickle.loads(pickle.dumps(trainer(1))).strategy).__name__ if world == 1 else "TexMoEStrategy",
        "threads": threads,
    }


@pytest.mark.parametrize("world", [1, 2])
def test_modules_callbacks_and_strategies_are_copied_and_pickled(world: int) -> None:
    for found in on_ranks(world, copies, world):
        assert found["same"] and found["mesh"] is None and found["links"]
        assert found["strategy"] == 2 and found["trainer"] == "TexMoEStrategy"
        assert not found["threads"]


class Counting(L.LightningDataModule):
    """Has a state."""

    def train_dataloader(self) -> DataLoader:
        return rows(2)

    val_dataloader = train_dataloader

    def state_dict(self) -> dict[str, Any]:
        return {"count": 7}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


def test_what_a_trainer_has_saved_is_restored_after_its_fit(tmp_path: Path) -> None:
    on_ranks(1, saved_and_restored, tmp_path)


def saved_and_restored(tmp_path: Path) -> None:
    fit = quiet(strategy=tex.TexMoEStrategy(save_distributed_checkpoint=False), devices=1, max_steps=2)
    data = Counting()
    fit.fit(Small(), data)
    fit.save_checkpoint(tmp_path / "after.ckpt")
    fit._checkpoint_connector._restore_modules_and_callbacks(tmp_path / "after.ckpt")
    assert data.count == 7
    fit.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(KeyError, match=r"contains only the model's weights: .*weights.ckpt has no optimizer states"):
        fit._checkpoint_connector.restore(tmp_path / "weights.ckpt")


class Ending(Small):
    """Its second step has nothing left."""

    def training_step(self, batch: Any, _: int) -> Tensor:
        if self.batches == 1:
            raise StopIteration
        return super().training_step(batch, _)


def test_a_step_of_one_process_may_end_the_epoch() -> None:
    on_ranks(1, ended_by_its_step)


def ended_by_its_step() -> None:
    module = Ending()
    fit = quiet(strategy="tex_moe", devices=1, max_epochs=1, max_steps=-1)
    fit.fit(module, rows(4), rows(1))
    assert fit.global_step == module.batches == 1


def test_a_checkpoint_is_saved_before_a_fit(tmp_path: Path) -> None:
    module = Small()
    fit = quiet(strategy=tex.TexMoEStrategy(save_distributed_checkpoint=False), devices=1)
    fit.strategy.connect(module)
    module.trainer = fit
    fit.save_checkpoint(tmp_path / "before.ckpt")
    again = Small.load_from_checkpoint(tmp_path / "before.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
