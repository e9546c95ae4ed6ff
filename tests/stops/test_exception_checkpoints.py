"""Checkpoints on an exception: saved when all ranks raise it, and only then; nobody waits for a rank that is gone."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
from helpers.stopped_runs import fit
from helpers.stops import Ending, run_to_its_end
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from lightning_tex.saving import latest, paths

NOT_SAVED = "no checkpoint is saved on this error: that takes all ranks, and not all raised it; "


class OwnHook(L.Callback):
    def on_exception(self, trainer: L.Trainer, *_: object) -> None:
        trainer.save_checkpoint("rescue/own.ckpt")


def saves(kind: str) -> L.Callback:
    if kind == "ModelCheckpoint":
        return ModelCheckpoint("rescue", "rescued", save_on_exception=True, every_n_epochs=1000)
    return OnExceptionCheckpoint("rescue") if kind == "OnExceptionCheckpoint" else OwnHook()


def raised(folder: Path, kind: str, rank: int, deed: str = "raise") -> Ending:
    incident = {"deed": deed, "rank": rank, "point": "forward", "step": 3}
    ending = run_to_its_end(4, lambda: fit(incident, callbacks=(saves(kind),)), folder=folder, within=40)
    assert not ending.left, ending.text
    assert len(ending.codes) == 4 and 0 not in ending.codes.values(), ending
    return ending


KINDS = ("ModelCheckpoint", "OnExceptionCheckpoint", "own hook")


@pytest.mark.parametrize(
    ("kind", "deed"),
    [
        ("ModelCheckpoint", "raise"),
        *(pytest.param(kind, "raise", marks=pytest.mark.faults) for kind in KINDS[1:]),
        *(pytest.param(kind, "SIGKILL", marks=pytest.mark.faults) for kind in KINDS),
    ],
)
def test_an_error_of_one_rank_saves_nothing_and_says_so(tmp_path: Path, kind: str, deed: str) -> None:
    ending = raised(tmp_path, kind, 1, deed)
    assert ending.took_less_than(5), ending
    assert ending.text.count(NOT_SAVED) <= 1
    if deed == "raise":
        (line,) = (line for line in ending.lines if NOT_SAVED in line)
        assert line.startswith("[rank 1] ")
        assert line.endswith("checkpoints/step=2.ckpt")
    assert latest(tmp_path / "rescue") is None
    assert "saved checkpoint to" not in ending.text


@pytest.mark.parametrize("kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.faults) for kind in KINDS[1:])])
def test_an_error_of_all_ranks_saves(tmp_path: Path, kind: str) -> None:
    ending = raised(tmp_path, kind, -1)
    assert ending.took_less_than(8), ending
    assert NOT_SAVED not in ending.text
    newest = latest(tmp_path / "rescue")
    assert newest is not None and paths.manifest_of(newest).step == 3, ending.text
    assert ending.text.count("]: ValueError: what this rank cannot do") == 1
    assert ending.text.count("lightning_tex: the newest complete checkpoint is ") == 1
