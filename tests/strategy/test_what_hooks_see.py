"""What hooks, copies and callbacks of a user see: as under Lightning's other strategies, in one process and in two."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.ranks import on_ranks
from helpers.trainers import quiet
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint, ModelSummary
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_tex as tex
from lightning_tex.layers import ColumnParallelLinear, RowParallelLinear

WORLDS = pytest.mark.parametrize("world", [1, 2])


class Noting(L.LightningModule):
    """A layer that is cut and one that is not; notes what its hooks see."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = ColumnParallelLinear(4, 6), RowParallelLinear(6, 4)
        self.plain = nn.Linear(4, 4)
        self.called: list[str] = []
        self.seen: dict[str, Any] = {}
        self.with_head = True

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        self.seen["before"] = [p.grad for p in self.parameters()]
        x = self.plain(batch) if self.with_head else batch
        return self.down(self.up(x)).square().sum()

    def configure_optimizers(self) -> Any:
        self.called.append("configure_optimizers")
        self.seen["weights"] = float(self.plain.weight.detach().sum())
        return torch.optim.AdamW(self.parameters(), lr=0.1)

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        self.called.append("on_load_checkpoint")
        self.seen["keys"] = set(checkpoint)

    def on_fit_start(self) -> None:
        self.called.append("on_fit_start")
        self.seen["best"] = getattr(self.trainer.checkpoint_callback, "best_model_path", None)


def rows(rank: int = 0) -> DataLoader:
    return DataLoader([torch.full((2, 4), 1.0 + rank)] * 2, batch_size=None)


def trainer(world: int, tensor: int = 1, **flags: Any) -> L.Trainer:
    options = {"save_distributed_checkpoint": flags.pop("directories", True), "tensor_parallel_size": tensor}
    flags = {"max_epochs": 1, "num_sanity_val_steps": 0, "use_distributed_sampler": False, **flags}
    return quiet(devices=world, strategy=tex.TexMoEStrategy(**options), **flags)


def resumed(world: int, folder: str, directories: bool) -> dict[str, Any]:
    flags: dict[str, Any] = {"tensor": world, "directories": directories}
    first = trainer(world, callbacks=[ModelCheckpoint(folder, save_last=True)], **flags)
    module = Noting()
    first.fit(module, rows())
    saved = float(module.plain.weight.detach().sum())
    second = trainer(world, max_epochs=2, callbacks=[ModelCheckpoint(folder, save_last=True)], **flags)
    module = Noting()
    second.fit(module, rows(), ckpt_path=f"{folder}/last.ckpt")
    return {"called": module.called, "saved": saved, "steps": second.global_step, **module.seen}


@WORLDS
@pytest.mark.parametrize("directories", [True, False])
def test_hooks_of_a_resumed_fit_see_weights_and_callbacks_restored(
    world: int, directories: bool, tmp_path: Path
) -> None:
    for seen in on_ranks(world, resumed, world, str(tmp_path), directories):
        assert seen["called"] == ["on_load_checkpoint", "configure_optimizers", "on_fit_start"]
        assert seen["weights"] == seen["saved"] and seen["steps"] == 4
        assert seen["best"].startswith(str(tmp_path))
        assert "lightning_tex" not in seen["keys"]


class Clipping(Noting):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.seen["whole"] = {name: p.grad.clone() for name, p in self.named_parameters()}
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        self.seen["clipped"] = {name: p.grad.clone() for name, p in self.named_parameters()}


def clipped(world: int) -> dict[str, Any]:
    module = Clipping()
    fit = trainer(world, max_steps=1)
    fit.fit(module, rows(fit.global_rank))
    return {key: module.seen[key] for key in ("before", "whole", "clipped")}


def test_clipping_sees_the_averaged_gradient_and_leaves_the_clipped_one() -> None:
    module = Noting()
    for batch in (torch.full((2, 4), 1.0), torch.full((2, 4), 2.0)):
        (module.training_step(batch, 0) / 2).backward()
    expected = {name: p.grad.clone() for name, p in module.named_parameters()}
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
    assert norm > 0.5
    for seen in on_ranks(2, clipped, 2):
        assert seen["before"] == [None] * len(expected)
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(seen["whole"][name], expected[name])
            torch.testing.assert_close(seen["clipped"][name], parameter.grad)


class Thaws(BaseFinetuning):
    """Trains the first layer from the second epoch on."""

    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        self.freeze(pl_module.plain)

    def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.plain, optimizer, lr=0.2)


class FineTuned(Noting):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1)


def fine_tuned(world: int, folder: str) -> dict[str, Any]:
    trainer(world, max_epochs=2, callbacks=[Thaws(), ModelCheckpoint(folder, save_last=True)]).fit(FineTuned(), rows())
    fit = trainer(world, max_epochs=3, callbacks=[Thaws()])
    fit.fit(FineTuned(), rows(), ckpt_path=f"{folder}/last.ckpt")
    groups = fit.optimizers[0].param_groups
    return {"groups": [(len(group["params"]), group["lr"]) for group in groups], "steps": fit.global_step}


@WORLDS
def test_a_finetuning_that_added_groups_goes_on(world: int, tmp_path: Path) -> None:
    for seen in on_ranks(world, fine_tuned, world, str(tmp_path)):
        assert seen["groups"] == [(4, 0.1), (2, 0.2)] and seen["steps"] == 6


class LoadsItself(Noting):
    def load_state_dict(self, state_dict: Mapping[str, Any], *arguments: Any, **options: Any) -> Any:
        self.called.append("load_state_dict")
        return super().load_state_dict(state_dict, *arguments, **options)


class Copies(L.Callback):
    """Copies the others, one of which knows the Trainer as progress bars do."""

    def on_fit_start(self, trainer: L.Trainer, *_: Any) -> None:
        others: list[Any] = [callback for callback in trainer.callbacks if callback is not self]
        others[0].trainer = trainer
        self.copies = copy.deepcopy(others)


def in_one_process(folder: str) -> dict[str, Any]:
    module = Noting()
    copies = Copies()
    fit = trainer(1, callbacks=[copies, L.Callback(), ModelCheckpoint(folder, save_last=True)])
    validated: list[int] = []
    fit.fit_loop.epoch_loop.val_loop.run = lambda: validated.append(1)  # as a mock is
    own = fit.fit_loop.epoch_loop.val_loop.run
    fit.fit(module, rows())
    (optimizer,) = fit.optimizers
    states = optimizer.state_dict()
    plain = torch.optim.AdamW(Noting().parameters(), lr=0.1)
    plain.load_state_dict(states)
    optimizer.load_state_dict(states)
    again = optimizer.state_dict()
    same = all(torch.equal(states["state"][n][k], again["state"][n][k]) for n in states["state"] for k in ("exp_avg",))
    fit.save_checkpoint(f"{folder}/plain.ckpt", weights_only=True)
    loaded = Noting.load_from_checkpoint(f"{folder}/last.ckpt")
    file = trainer(1, directories=False)
    file.strategy.connect(module)
    file.fit(module, rows())
    file.save_checkpoint(f"{folder}/file.ckpt")
    asked = [LoadsItself(), LoadsItself()]
    for module, saved in zip(asked, ("file", "last"), strict=True):
        before = trainer(1).strategy.load_checkpoint(f"{folder}/{saved}.ckpt")  # there is no model
        trainer(1, max_epochs=2).fit(module, rows(), ckpt_path=f"{folder}/{saved}.ckpt")
        assert before["state_dict"].keys() == module.state_dict().keys()
    return {
        "steps": {int(state["step"]) for state in plain.state.values()},
        "same": same,
        "copied": len(copies.copies),
        "own": fit.fit_loop.epoch_loop.val_loop.run is own,
        "loaded": all(torch.isfinite(p).all() for p in loaded.parameters()),
        "asked": [module.called for module in asked],
    }


def test_what_one_process_has_besides(tmp_path: Path) -> None:
    (found,) = on_ranks(1, in_one_process, str(tmp_path))
    assert found["steps"] == {2} and found["same"] and found["copied"] >= 2 and found["own"] and found["loaded"]
    of_file, of_directory = found["asked"]
    assert of_file[:2] == ["on_load_checkpoint", "load_state_dict"] and "load_state_dict" in of_directory


def summarised(world: int) -> Any:
    told: dict[str, Any] = {}

    class Told(ModelSummary):
        @staticmethod
        def summarize(
            summary_data: Any, total_parameters: int, trainable_parameters: int, *rest: Any, **_: Any
        ) -> None:
            told.update(rows=dict(summary_data), total=total_parameters, size=rest[0])

    module = Noting()
    module.down.bias.requires_grad_(False)
    fit = trainer(world, tensor=world, callbacks=[Told()], enable_model_summary=True)
    fit.fit(module, rows())
    return (told, vars(fit.callbacks[-1]).get("_summary")) if fit.is_global_zero else None


@WORLDS
def test_the_summary_counts_whole_parameters(world: int) -> None:
    (told, left), *_ = on_ranks(world, summarised, world)
    whole = {name: sum(p.numel() for p in layer.parameters()) for name, layer in Noting().named_children()}
    assert told["rows"]["Name"] == list(whole) and [int(n) for n in told["rows"]["Params"]] == list(whole.values())
    assert told["total"] == sum(whole.values()) and told["size"] == pytest.approx(4e-6 * told["total"])
    assert left is None
