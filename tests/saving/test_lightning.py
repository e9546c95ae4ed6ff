"""Lightning's own ways to checkpoints: ModelCheckpoint, ckpt_path words, hooks, and what is refused by name."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from helpers.cases import in_full, selected
from helpers.checkpoint_runs import EPOCH, Data, Model, fit, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO
from torch import nn

import lightning_tex as tex
from lightning_tex.saving.local_store import LocalStore
from lightning_tex.testing.ranks import run_ranks

RANKS = 2
TENSOR, EXPERT = {"tensor_parallel_size": 2}, {"expert_parallel_size": 2}
# Resuming writes on into the folder it resumes from.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

PLAIN = {**EXPERT, "save_distributed_checkpoint": False}


class Remembers(L.Callback):
    """Keeps a path and a tensor in its state."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"path": Path("a/b"), "best": torch.tensor(1.5)}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


class Hooked(Model):
    """Keeps something of its own in the checkpoint."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = {"answer": 42}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.found = checkpoint["mine"]


class Wider(Model):
    """Another model: one parameter of another shape and one more."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.more = nn.Parameter(torch.ones(2))


class Larger(Model):
    """One more parameter, and that is all right."""

    strict_loading = False

    def __init__(self) -> None:
        super().__init__(seed=4)
        self.more = nn.Parameter(torch.full((2,), 7.0))


def visible(folder: str | Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def callbacks(folder: str, save_last: Any) -> list[L.Callback]:
    best = ModelCheckpoint(folder, "{epoch}", monitor="val_loss", save_top_k=2, save_last=save_last, mode="max")
    return [best, Remembers()]


def run_callbacks(folder: str, layout: dict[str, Any], save_last: Any) -> dict[str, Any]:
    used = callbacks(folder, save_last)

    def evaluate(run: L.Trainer, module: Model) -> dict[str, Any]:
        newest = Path(folder, "last.ckpt")
        disk = {"link": newest.is_symlink(), "directory": newest.is_dir(), "names": visible(folder)}
        last = float(run.callback_metrics["val_loss"])
        (best,) = run.test(module, Data(), ckpt_path="best", verbose=False)
        (again,) = run.validate(module, Data(), ckpt_path="last", verbose=False)
        return {"best": float(used[0].best_model_score), "test": best["test_loss"], "last": last, "disk": disk, **again}

    first = fit(layout, RANKS, 2, callbacks=used, then=evaluate, **OPTIONS)
    resumed = fit(layout, RANKS, 3, ckpt_path="last", callbacks=callbacks(folder, save_last), seed=6, **OPTIONS)
    return {**first["then"], "resumed": resumed, "first": first}


# strategy, ModelCheckpoint's save_last
SAVED: dict[str, tuple[dict[str, Any], Any]] = {
    "copy": (TENSOR, True),
    "link": (TENSOR, "link"),
    "plain": (PLAIN, "link"),
}
DEFAULT = ("link", "plain")
OPTIONS: dict[str, Any] = {"model": {"dropout": 0.1}, "limit_val_batches": 2, "limit_test_batches": 2}


def everything(folder: str, names: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {name: run_callbacks(f"{folder}/{name}", *SAVED[name]) for name in names}
    found["unbroken"] = fit(TENSOR, RANKS, 3, **OPTIONS)
    found["hooks"] = [hooks(f"{folder}/hooks {i}", layout) for i, layout in enumerate((TENSOR, PLAIN))]
    found["refused"] = refused(folder)
    return found


def hooks(path: str, layout: dict[str, Any]) -> tuple[Any, Any]:
    run = trainer(tex.TexMoEStrategy(**layout), RANKS, callbacks=[Remembers()])
    run.fit(Hooked(), Data())
    run.save_checkpoint(path)
    run.save_checkpoint(path)  # over itself
    module, memory = Hooked(), Remembers()
    run = trainer(tex.TexMoEStrategy(**layout), RANKS, callbacks=[memory])
    run.fit(module, Data(), ckpt_path=path)
    return module.found, memory.state


def refused(folder: str) -> dict[str, str]:
    path = f"{folder}/weights.ckpt"
    run = trainer(tex.TexMoEStrategy(**TENSOR), RANKS)
    module = Model()
    run.fit(module, Data())
    run.save_checkpoint(path, weights_only=True)
    larger = Larger()
    trainer(tex.TexMoEStrategy(**TENSOR), RANKS).test(larger, Data(), ckpt_path=path, verbose=False)
    assert all(torch.equal(p, dict(larger.named_parameters())[n]) for n, p in module.named_parameters())
    assert larger.more.tolist() == [7.0, 7.0]

    run.strategy.checkpoint_io = AsyncCheckpointIO(TorchCheckpointIO())
    said = {"async": message(lambda: run.save_checkpoint(path))}
    run.strategy.checkpoint_io = TorchCheckpointIO()
    fresh = trainer(tex.TexMoEStrategy(**TENSOR), RANKS)
    return said | {
        "weights only": message(lambda: fresh.fit(Model(), Data(), ckpt_path=path)),
        "storage options": message(lambda: run.save_checkpoint(path, storage_options={})),
        "remote": message(lambda: run.save_checkpoint("nosuch://bucket/a.ckpt")),
        "shapes": message(lambda: fresh.test(Wider(), Data(), ckpt_path=path)),
        "no checkpoint": message(lambda: fresh.test(Model(), Data(), ckpt_path=folder)),
        "nothing there": message(lambda: fresh.test(Model(), Data(), ckpt_path=f"{folder}/nothing")),
        "somebody's": message(lambda: run.save_checkpoint(folder)),
        "cannot write": message(lambda: run.save_checkpoint(f"{path}/meta.pt/below.ckpt")),
    }


def message(act: Callable[[], object]) -> str:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lightning")


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, Any]]:
    names = [name for name in SAVED if name in selected(request, "saved")]
    return run_ranks(RANKS, everything, str(folder), names, detail=False)


@pytest.mark.parametrize("saved", in_full(SAVED, DEFAULT))
def test_best_and_last_name_the_checkpoints_of_those_epochs(ranks: list[dict[str, Any]], saved: str) -> None:
    for found in (rank[saved] for rank in ranks):
        assert found["test"] == pytest.approx(found["best"], rel=1e-6)
        assert found["val_loss"] == pytest.approx(found["last"], rel=1e-6)
        assert found["best"] > found["last"]


@pytest.mark.parametrize("saved", in_full(["copy", "link"], DEFAULT))
def test_resume_from_last_is_bit_equal(ranks: list[dict[str, Any]], saved: str) -> None:
    for rank in ranks:
        assert rank[saved]["resumed"]["losses"] == rank["unbroken"]["losses"][2 * EPOCH :]
        assert torch.equal(rank[saved]["resumed"]["own"], rank["unbroken"]["own"])


@pytest.mark.parametrize("saved", in_full(SAVED, DEFAULT))
def test_what_is_on_disk(folder: Path, ranks: list[dict[str, Any]], saved: str) -> None:
    names = ["epoch=0.ckpt", "epoch=1.ckpt", "last.ckpt"]
    for rank in ranks:
        assert rank[saved]["disk"] == {"link": True, "directory": saved != "plain", "names": names}
    # The resumed run's third epoch was among the best two only as the last.
    assert visible(folder / saved) == names
    # What is hidden is what last.ckpt leads to, and nothing else.
    hidden = [entry for entry in (folder / saved).iterdir() if entry.name.startswith(".")]
    assert hidden == ([] if saved == "plain" else [(folder / saved / "last.ckpt").resolve()])


def test_hooks_and_callbacks_keep_their_state(ranks: list[dict[str, Any]]) -> None:
    for mine, remembered in ranks[-1]["hooks"]:
        assert mine == {"answer": 42}
        assert str(remembered["path"]) == "a/b"
        assert remembered["best"] == 1.5


@pytest.mark.parametrize("case", ["hooks 0", "hooks 1"])
def test_hooks_see_the_whole_checkpoint_without_a_trainer(folder: Path, ranks: object, case: str) -> None:
    assert tex.load_from_checkpoint(Hooked, folder / case).found == {"answer": 42}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("async", "MisconfigurationException: AsyncCheckpointIO writes single files"),
        (
            "weights only",
            "weights.ckpt has no optimizer states, so no fit can go on from it",
        ),
        ("storage options", "TypeError: TexMoEStrategy.save_checkpoint(storage_options=...)"),
        ("remote", "nosuch://bucket/a.ckpt cannot be reached: Protocol not known: nosuch"),
        ("shapes", "missing from the checkpoint: more; of another shape: scale (saved [], model [3])"),
        ("no checkpoint", "manifest.json: expected the manifest of a complete checkpoint, found none"),
        ("nothing there", "UserFileError: Checkpoint file not found: there is no checkpoint"),
        ("somebody's", "is a directory, and not a checkpoint that could be replaced"),
        ("cannot write", "NotADirectoryError"),
    ],
)
def test_what_cannot_be_done_is_said_on_every_rank(ranks: list[dict[str, Any]], case: str, words: str) -> None:
    for rank in ranks:
        assert words in rank["refused"][case]


@dataclass
class SavesTwice(L.Callback):
    """Asks for a name while what has it is still being written."""

    def __init__(self, folder: str) -> None:
        self.path, self.names = f"{folder}/same.ckpt", ModelCheckpoint(folder, filename="same")
        self.found: list[bool] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int) -> None:
        if index == 0:
            may_end = threading.Event()
            install = LocalStore.install

            def late(*arguments: Any) -> None:
                may_end.wait()
                install(*arguments)

            with mock.patch.object(LocalStore, "install", late):
                trainer.save_checkpoint(self.path)
                self.found = [Path(self.path).exists(), self.names.file_exists(self.path, trainer)]
                may_end.set()
                trainer.strategy.finish_saves()


def _saves_twice(folder: str) -> list[bool]:
    asks = SavesTwice(folder)
    trainer(tex.TexMoEStrategy(), 1, callbacks=[asks, asks.names]).fit(Model(), Data())
    return asks.found


def test_a_name_is_taken_from_when_its_save_begins(tmp_path: Path) -> None:
    assert run_ranks(1, _saves_twice, str(tmp_path)) == [[False, True]]


class Options:
    """A type that torch does not load safely."""

    width: int = 3


def test_an_object_that_cannot_be_loaded_safely_is_announced_when_saving(tmp_path: Path) -> None:
    found = run_ranks(1, _unsafe, str(tmp_path))[0]
    assert "Options" in found["warned"]
    assert "add_safe_globals" in found["warned"]
    assert "ValueError" in found["refused"]
    assert found["loaded"] == "nothing was raised" and found["trusted"] == "Model"


def _unsafe(folder: str) -> dict[str, str]:
    run = trainer(tex.TexMoEStrategy(), 1)
    module = Model()
    module.hparams["options"] = Options()
    run.fit(module, Data())
    with pytest.warns(UserWarning, match="Options") as warned:
        run.save_checkpoint(f"{folder}/unsafe.ckpt")
    refusal = message(lambda: run.test(Model(), Data(), ckpt_path=f"{folder}/unsafe.ckpt", verbose=False))
    trusted = Model.load_from_checkpoint(f"{folder}/unsafe.ckpt", weights_only=False, strict=False)
    torch.serialization.add_safe_globals([Options])
    loaded = message(lambda: run.test(Model(), Data(), ckpt_path=f"{folder}/unsafe.ckpt", verbose=False))
    return {"warned": str(warned[0].message), "refused": refusal, "loaded": loaded, "trusted": type(trusted).__name__}
