"""Runs whose checkpoints lie on file systems that are not mounted: saved, found, resumed and looked at as on disk."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoint_runs import EPOCH, Data, Model, fit, trainer
from helpers.object_store import ObjectStore, use_folder
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_tex as tex
from lightning_tex.cli import main
from lightning_tex.errors import UserError
from lightning_tex.saving import at, consolidated, latest
from lightning_tex.testing.ranks import run_ranks

TENSOR = {"tensor_parallel_size": 2, "tile_size": 256}
RANDOM = {"dropout": 0.1, "noise": True}
FOLDER = "objects://bucket/run"
NEWEST_TWO: dict[str, Any] = {"monitor": "step", "mode": "max", "save_top_k": 2}

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


def saves(folder: str) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_last=True, **NEWEST_TWO)


def run(folder: str | None, epochs: int, ckpt_path: str | None = None, world: int = 2, **more: Any) -> dict[str, Any]:
    callbacks = [] if folder is None else [saves(folder)]
    layout = TENSOR if world == 2 else {}
    return fit(layout, world, epochs, ckpt_path, model=RANDOM, callbacks=callbacks, **more)


def visible(folder: str) -> list[str]:
    return sorted(path.name for path in at(folder).iterdir() if not path.name.startswith("."))


def _on_two_ranks(folder: str) -> dict[str, Any]:
    unbroken = run(None, 3)
    begun = run(FOLDER, 2, "auto", save=f"{folder}/disk.ckpt")
    names = visible(FOLDER)
    resumed = run(FOLDER, 3, "auto", seed=6)
    return {"unbroken": unbroken, "begun": begun, "resumed": resumed, "names": names}


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    use_folder(folder / "objects")
    return folder


@pytest.fixture(scope="module")
def two_ranks(objects: Path) -> list[dict[str, Any]]:
    return run_ranks(2, _on_two_ranks, str(objects), detail=False)


def test_a_run_goes_on_bit_equal(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        assert rank["resumed"]["losses"] == rank["unbroken"]["losses"][2 * EPOCH :]
        assert torch.equal(rank["resumed"]["own"], rank["unbroken"]["own"])
        assert rank["names"] == ["last.ckpt", "step=3.ckpt", "step=4.ckpt"]


def test_what_was_pruned_is_gone(two_ranks: object) -> None:
    assert visible(FOLDER) == ["last.ckpt", "step=5.ckpt", "step=6.ckpt"]
    folders = {key.rpartition("/")[0] for key in ObjectStore()._sizes()}
    assert len(folders) == 1 + 3
    assert latest(FOLDER) == at(f"{FOLDER}/last.ckpt")  # of equal steps what was written last


def test_memory_is_shared_by_no_two_processes(objects: Path) -> None:
    for text in run_ranks(2, _memory_on_two, detail=False):
        assert "rank 1 does not see what rank 0 writes to memory://run" in text
        assert "Legal: a folder that all ranks see" in text


def _memory_on_two() -> str:
    try:
        run("memory://run", 1)
    except UserError as error:
        return str(error)
    return "nothing was raised"


def _in_memory(folder: str) -> dict[str, Any]:
    url = "memory://run"
    unbroken = run(None, 3, world=1)
    run(url, 2, world=1)
    resumed = run(url, 3, "last", world=1, seed=6, save=f"{folder}/disk.ckpt")
    plain = trainer(tex.TexMoEStrategy(save_distributed_checkpoint=False), 1)
    plain.fit(Model(), Data())
    plain.save_checkpoint(f"{url}/plain.ckpt")
    path = f"{url}/step={3 * EPOCH}.ckpt"
    for words in (["inspect", path], ["inspect", url], ["verify", path], ["consolidate", path]):
        main(["checkpoint", *words])
    return {
        "unbroken": unbroken,
        "resumed": resumed,
        "alike": consolidated(path)["state_dict"],
        "disk": consolidated(f"{folder}/disk.ckpt")["state_dict"],
        "loaded": dict(tex.load_from_checkpoint(Model, path).named_parameters()),
        "by Lightning": dict(Model.load_from_checkpoint(path).named_parameters()),
        "plain": dict(tex.load_from_checkpoint(Model, f"{url}/plain.ckpt").named_parameters()),
        "plain model": dict(plain.lightning_module.named_parameters()),
        "initial": _begun_from(f"{url}/plain.ckpt"),
        "steps": _resumed_without_us(url),
    }


def _resumed_without_us(url: str) -> int:
    run_ = trainer("auto", 1, 4, callbacks=[saves(url)])
    run_.fit(Model(), Data(), ckpt_path=f"{url}/whole-of-step={3 * EPOCH}.ckpt")
    return run_.global_step


def _begun_from(path: str) -> dict[str, Any]:
    module = Model()
    trainer(tex.TexMoEStrategy(init_from=path), 1, limit_train_batches=0).fit(module, Data())
    return dict(module.named_parameters())


def test_everything_works_in_memory_of_one_process(tmp_path: Path) -> None:
    found = run_ranks(1, _in_memory, str(tmp_path), detail=False)[0]
    assert found["resumed"]["losses"] == found["unbroken"]["losses"][2 * EPOCH :]
    assert torch.equal(found["resumed"]["own"], found["unbroken"]["own"])
    for name, value in found["disk"].items():
        assert torch.equal(found["alike"][name], value)
    for name, value in found["loaded"].items():
        assert torch.equal(found["alike"][name], value)
        assert torch.equal(found["by Lightning"][name], value)
    for name, value in found["plain"].items():
        assert torch.equal(found["plain model"][name], value)
        assert torch.equal(found["initial"][name], value)
    assert found["steps"] > 3 * EPOCH


# --- kill -9


class KillsAt:
    """Ends a rank by force before one of the requests by which it changes the store."""

    def __init__(self, rank: int, number: int) -> None:
        self.own, self.number, self.seen = int(os.environ["RANK"]) == rank, number, 0

    def __call__(self, request: str, key: str) -> None:
        self.seen += 1
        if self.own and self.seen == self.number:
            os.kill(os.getpid(), signal.SIGKILL)


def _killed(rank: int, number: int) -> int:
    kills = KillsAt(rank, number)
    ObjectStore.before = kills
    run(FOLDER, 2)
    return kills.seen


def _goes_on() -> dict[str, Any]:
    newest = latest(FOLDER)
    return {**run(FOLDER, 2, "auto", seed=6 if newest else 5), "hidden": _unreferenced()}


def _unreferenced() -> list[str]:
    folders = {key.rpartition("/")[0].rpartition("/")[2] for key in ObjectStore()._sizes()} - {"run"}
    return sorted(folders - {at(f"{FOLDER}/{name}").resolve().name for name in visible(FOLDER)})


def _killed_and_resumed(folder: Path, rank: int, number: int) -> None:
    use_folder(folder)
    with pytest.raises(AssertionError, match="ended without a result"):
        run_ranks(2, _killed, rank, number, detail=False, timeout=60)
    whole = run_ranks(2, run, None, 2, detail=False)
    for own, unbroken in zip(run_ranks(2, _goes_on, detail=False), whole, strict=True):
        begun = len(unbroken["losses"]) - len(own["losses"])
        assert own["losses"] == unbroken["losses"][begun:]
        assert torch.equal(own["own"], unbroken["own"])
        assert not own["hidden"], "what the killed run left behind is still there"


def test_a_rank_that_is_killed_in_a_save_leaves_the_one_before(tmp_path: Path) -> None:
    _killed_and_resumed(tmp_path / "objects", rank=1, number=4)  # of two files of elements a step, the second step's


@pytest.mark.faults
@pytest.mark.parametrize("number", range(1, 40, 2))
def test_a_first_rank_that_is_killed_anywhere_in_saves(tmp_path: Path, number: int) -> None:
    _killed_and_resumed(tmp_path / "objects", rank=0, number=number)


def test_another_layout_goes_on_as_from_disk(objects: Path, two_ranks: object) -> None:
    use_folder(objects / "objects")
    run_ranks(2, _saved_both_ways, str(objects), detail=False)
    one, other = run_ranks(1, _resumed_both_ways, str(objects), detail=False)[0]
    assert one["losses"] == other["losses"]
    assert torch.equal(one["own"], other["own"])


def _saved_both_ways(folder: str) -> None:
    run_ = trainer(tex.TexMoEStrategy(**TENSOR), 2)
    run_.fit(Model(), Data())
    for path in (f"{folder}/both.ckpt", f"{FOLDER}/both.ckpt"):
        run_.save_checkpoint(path)


def _resumed_both_ways(folder: str) -> Any:
    return [fit({}, 1, 2, path) for path in (f"{FOLDER}/both.ckpt", f"{folder}/both.ckpt")]
