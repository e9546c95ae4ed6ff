"""What cannot be written is an error with a name, at the save or at the next step; the checkpoint before it stays."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from threading import Event
from typing import Any

import lightning as L
import pytest
from helpers.cases import case
from helpers.checkpoint_runs import EPOCH, Data, Model, trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_tex as tex
from lightning_tex.saving import archive, latest, newest, paths, writing
from lightning_tex.saving.background import Background
from lightning_tex.saving.local_store import LocalStore
from lightning_tex.saving.reading import Directory
from lightning_tex.testing.ranks import run_ranks

TED = {"tensor_parallel_size": 2, "expert_parallel_size": 2}


def said(act: Any, *arguments: Any) -> str:
    try:
        act(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def _full_disk(folder: str) -> dict[str, Any]:
    run = trainer(tex.TexMoEStrategy(**TED), 4)
    run.fit(Model(), Data())
    good, bad = Path(folder, "good.ckpt"), Path(folder, "bad.ckpt")
    run.save_checkpoint(good)
    found = {"over": False}
    if os.environ["RANK"] == "2":  # one of four ranks finds no room
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    found["full"] = said(run.save_checkpoint, bad)
    found["again"] = said(run.save_checkpoint, good)  # over the good one
    if os.environ["RANK"] == "2":
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run.strategy.barrier()
    found["left"] = sorted(entry.name for entry in Path(folder).iterdir())
    found["intact"] = said(Directory.verified, good)
    found["then"] = said(run.save_checkpoint, bad)
    return found


def test_a_full_disk_on_one_rank_is_named_on_all_and_harms_nothing(tmp_path: Path) -> None:
    for rank, found in enumerate(run_ranks(4, _full_disk, str(tmp_path), detail=False)):
        with case(rank=rank):
            assert "RuntimeError: saving the checkpoint" in found["full"]
            assert f"bad.ckpt (step {EPOCH}) failed: rank 2: OSError: [Errno 27] File too large" in found["full"]
            assert "rank 2" in found["again"]
            assert found["left"] == ["good.ckpt"]
            assert found["intact"] == found["then"] == "nothing was raised"


def _unwritable(place: str) -> str:
    run = trainer(tex.TexMoEStrategy(**TED), 4)
    run.fit(Model(), Data())
    return said(run.save_checkpoint, f"{place}/a.ckpt")


def test_a_directory_that_cannot_be_written_is_named_on_every_rank(tmp_path: Path) -> None:
    place = tmp_path / "read only"
    place.mkdir(mode=0o500)
    if os.access(place, os.W_OK):  # the superuser may write everywhere but here
        place = Path("/proc/sys/kernel")
    for rank, text in enumerate(run_ranks(4, _unwritable, str(place), detail=False)):
        with case(rank=rank):
            assert str(place) in text
            assert "PermissionError" in text or "FileNotFoundError" in text or "OSError" in text


class Steps(L.Callback):
    """How many training steps were taken."""

    count = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.count += 1


def _in_background(folder: str) -> dict[str, Any]:
    write, failing = writing.write_tensors, {"from": 3, "saves": 0}

    def full(*arguments: Any) -> Any:
        failing["saves"] += 1
        if failing["saves"] >= failing["from"] and os.environ["RANK"] == "1":
            raise OSError(28, "No space left on device")
        return write(*arguments)

    writing.write_tensors = full
    steps = Steps()
    # Keeping one only: the one before is removed when the next is complete, and not when it is not.
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=1)
    run = trainer(tex.TexMoEStrategy(**TED), 4, 2, callbacks=[saves, steps])
    text = said(run.fit, Model(), Data())
    return {"text": text, "steps": steps.count, "latest": latest(folder), "names": sorted(os.listdir(folder))}


def test_a_failure_in_the_background_ends_the_run_by_name_and_keeps_the_last(tmp_path: Path) -> None:
    ranks = run_ranks(4, _in_background, str(tmp_path), detail=False)
    name = "step=3.ckpt (step 3) failed: rank 1: OSError: [Errno 28] No space left on device"
    assert any(name in found["text"] for found in ranks)
    for rank, found in enumerate(ranks):
        with case(rank=rank):
            assert found["text"] != "nothing was raised"
            assert found["steps"] <= 4  # the next step, or one more where a rank had begun it already
            assert found["latest"] == tmp_path / "step=2.ckpt"
    assert "step=2.ckpt" in os.listdir(tmp_path)


def _beside(folder: str, background: bool) -> dict[str, Any]:
    write, third_step, existed = archive.NewFile.finish, Event(), []

    def held_back(self: archive.NewFile) -> Any:
        assert third_step.wait(60), "training waits for the write"
        return write(self)

    if background:
        archive.NewFile.finish = held_back  # type: ignore[method-assign]

    class Watches(L.Callback):
        def on_train_batch_start(self, run: L.Trainer, *_: Any) -> None:
            if run.global_step == 2:
                existed.append(Path(folder, "step=2.ckpt").exists())
                third_step.set()

    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    strategy = tex.TexMoEStrategy(background_saving=background)
    run = trainer(strategy, 1, 2, callbacks=[saves, Watches()])
    run.fit(Model(), Data(3))
    return {"existed": existed, "complete": [said(Directory.verified, Path(folder, f"step={n}.ckpt")) for n in (2, 6)]}


@pytest.mark.parametrize("background", [True, False])
def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, background: bool) -> None:
    found = run_ranks(1, _beside, str(tmp_path), background)[0]
    assert found["existed"] == [not background]
    assert found["complete"] == ["nothing was raised"] * 2


def test_jobs_after_a_failed_one_are_not_done() -> None:
    background, done = Background(), []

    def fails() -> None:
        raise OSError("no room")

    background.submit(fails)
    background.submit(lambda: done.append("removed the one before"))
    with pytest.raises(OSError, match="no room"):
        background.wait()
    background.submit(lambda: done.append("after it was said"))
    background.wait()
    assert done == ["after it was said"]
    assert background.close() is None


def _links(folder: str) -> list[str]:
    return sorted(f"{e.name} -> {os.readlink(e)}" for e in Path(folder).iterdir() if e.is_symlink())


def test_a_name_that_is_written_again_is_a_link_that_is_swapped(tmp_path: Path) -> None:
    def new(content: str) -> Path:
        partial = paths.partial_name(tmp_path / "last.ckpt")
        partial.mkdir()
        (partial / "file").write_text(content)
        return partial

    path = tmp_path / "last.ckpt"
    for content in ("1", "2", "3"):
        with case(content=content):
            LocalStore().install(new(content), path, linked=True)
            assert path.is_symlink()
            assert (path / "file").read_text() == content
            assert len(list(tmp_path.iterdir())) == 2
    LocalStore().link(tmp_path / "step=4.ckpt", path)
    assert _links(str(tmp_path)) == ["last.ckpt -> step=4.ckpt"]
    assert len(list(tmp_path.iterdir())) == 1


def test_what_was_cut_off_between_two_names_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    run_ranks(1, _saved_twice, str(path))
    version = path.resolve()
    path.unlink()
    assert newest.find(path) == version
    assert latest(tmp_path) == version
    with pytest.raises(FileNotFoundError, match=f"the newest complete whole state there is {version}"):
        newest.find(tmp_path / "b.ckpt")


def _saved_twice(path: str) -> None:
    run = trainer(tex.TexMoEStrategy(), 1)
    run.fit(Model(), Data())
    run.save_checkpoint(path)
    run.save_checkpoint(path)
