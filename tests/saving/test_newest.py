"""Which checkpoint is the newest whole state: told from names, heads and sizes, without reading a tensor."""

from __future__ import annotations

import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoint_runs import BATCH, Data, Model, trainer
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

import lightning_tex as tex
from lightning_tex.cli import main
from lightning_tex.saving import CorruptCheckpointError, Place, SavedState, Search, latest, paths
from lightning_tex.saving.contents import contents, holds_whole_state
from lightning_tex.saving.manifest import MANIFEST, Manifest
from lightning_tex.testing.ranks import run_ranks

STEPS = Data().samples // BATCH
WHOLE = ("directory", "plain", "whole-of-directory")
WEIGHTS = ("weights directory", "weights plain", "weights-of-directory", "no callbacks")


def _save_every_kind(folder: str) -> None:
    for name, distributed in (("directory", True), ("plain", False)):
        run = trainer(tex.TexMoEStrategy(save_distributed_checkpoint=distributed), 1)
        run.fit(Model(), Data())
        run.save_checkpoint(f"{folder}/{name}.ckpt")
        run.save_checkpoint(f"{folder}/weights {name}.ckpt", weights_only=True)
    torch.save({"state_dict": {"scale": torch.ones(())}}, f"{folder}/no callbacks.ckpt")
    main(["checkpoint", "consolidate", f"{folder}/directory.ckpt"])
    main(["checkpoint", "consolidate", f"{folder}/directory.ckpt", "--weights_only"])


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    run_ranks(1, _save_every_kind, str(folder))
    return folder


def test_lightning_numbers_slurms_checkpoints_past_hidden_names(tmp_path: Path) -> None:
    for name in [f"hpc_ckpt_{number}.ckpt" for number in (2, 10)]:
        (tmp_path / name).mkdir()
        for hidden in (paths.hidden(tmp_path / name), paths.partial_name(tmp_path / name)):
            hidden.mkdir()
            assert paths.is_version(hidden, tmp_path / name)
    (tmp_path / ".hpc_ckpt_10.ckpt.00a1b2c3").mkdir()  # as they were called once
    assert paths.stands_for(tmp_path / ".hpc_ckpt_10.ckpt.00a1b2c3") == tmp_path / "hpc_ckpt_10.ckpt"
    (tmp_path / ".hpc_ckpt_10.ckpt.00a1b2c3").rmdir()
    assert _CheckpointConnector.hpc_save_path(str(tmp_path)) == f"{tmp_path}/hpc_ckpt_11.ckpt"


def at_step(kinds: Path, path: Path, step: int, written: float = 0.0) -> Path:
    """A whole directory that says it is of this step."""
    shutil.copytree(kinds / "directory.ckpt", path)
    manifest = Manifest.from_bytes((path / MANIFEST).read_bytes(), path)
    (path / MANIFEST).write_bytes(replace(manifest, step=step, written=written).to_bytes())
    return path


def cut(path: Path) -> Path:
    """Damage that sizes tell."""
    file = next(path.glob("*.distcp")) if path.is_dir() else path
    os.truncate(file, file.stat().st_size // 2)
    return path


def names(search: Search) -> list[str]:
    return [state.path.name for state in search]


@pytest.mark.parametrize("kind", [*WHOLE, *WEIGHTS])
def test_a_whole_state_is_told_from_weights(kinds: Path, kind: str) -> None:
    state = SavedState.of(kinds / f"{kind}.ckpt")
    assert state.is_whole() == (kind in WHOLE)
    assert state.step == (0 if kind == "no callbacks" else STEPS)


def test_a_consolidated_file_is_never_called_last(kinds: Path) -> None:
    assert {path.name for path in kinds.iterdir()} >= {"whole-of-directory.ckpt", "weights-of-directory.ckpt"}


def test_most_steps_go_first_and_then_what_was_written_last(kinds: Path, tmp_path: Path) -> None:
    for name, step, written in (("a", 3, 9.0), ("b", 7, 1.0), ("c", 7, 2.0), ("last", 5, 3.0), ("last-v1", 6, 4.0)):
        at_step(kinds, tmp_path / f"{name}.ckpt", step, written)
    order = ["c.ckpt", "b.ckpt", "last-v1.ckpt", "last.ckpt", "a.ckpt"]
    assert names(Search([Place(tmp_path)])) == order
    own = frozenset({tmp_path / "last.ckpt"})
    assert names(Search([Place(tmp_path)], own)) == ["last.ckpt", *(name for name in order if name != "last.ckpt")]
    assert latest(tmp_path, without=tmp_path / "c.ckpt") == tmp_path / "b.ckpt"


def test_of_equal_steps_a_directory_goes_before_a_file_without_random_states(kinds: Path) -> None:
    search = Search([Place(kinds)])
    found = names(search)
    assert found[0] == "directory.ckpt"
    assert set(found) == {f"{kind}.ckpt" for kind in WHOLE}
    assert {state.path.name for state in search.weights} == {f"{kind}.ckpt" for kind in WEIGHTS}
    assert not search.damaged


def test_of_equal_steps_a_stops_goes_first_though_another_was_written_later(kinds: Path, tmp_path: Path) -> None:
    stopped = at_step(kinds, tmp_path / "stopped-step=4.ckpt", 4, written=1.0)
    at_step(kinds, tmp_path / "epoch=0.ckpt", 4, written=2.0)
    assert latest(tmp_path) == stopped


def test_what_is_damaged_or_leads_nowhere_is_passed_over_by_name(kinds: Path, tmp_path: Path) -> None:
    good = at_step(kinds, tmp_path / "good.ckpt", 1)
    damaged = [cut(at_step(kinds, tmp_path / "cut.ckpt", 9)), tmp_path / "dangling.ckpt", tmp_path / "empty.ckpt"]
    (tmp_path / "dangling.ckpt").symlink_to("pruned.ckpt")
    (tmp_path / "empty.ckpt").mkdir()
    damaged += [cut(Path(shutil.copy(kinds / f"{kind}.ckpt", tmp_path))) for kind in ("plain", "weights plain")]
    at_step(kinds, tmp_path / ".step=10.ckpt.0123abcd.partial", 10)
    (tmp_path / "notes.txt").write_text("none of ours")
    (tmp_path / "logs").mkdir()
    search = Search([Place(tmp_path), Place(tmp_path / "missing")])
    assert names(search) == [good.name]
    assert len(search.damaged) == len(damaged)
    for path in damaged:
        assert any(str(path) in text for text in search.damaged)


def test_a_hidden_version_counts_only_where_a_save_was_cut_off_between_two_names(kinds: Path, tmp_path: Path) -> None:
    version = at_step(kinds, tmp_path / ".last.ckpt.0123abcd", 9)
    assert latest(tmp_path) == version
    at_step(kinds, tmp_path / "last.ckpt", 1)
    assert latest(tmp_path) == tmp_path / "last.ckpt"


def test_a_link_and_what_it_leads_to_are_one(kinds: Path, tmp_path: Path) -> None:
    at_step(kinds, tmp_path / "step=4.ckpt", 4)
    (tmp_path / "last.ckpt").symlink_to("step=4.ckpt")
    assert len(list(Search([Place(tmp_path)]))) == 1


def test_a_place_may_want_some_names_only(kinds: Path, tmp_path: Path) -> None:
    at_step(kinds, tmp_path / "hpc_ckpt_2.ckpt", 2)
    at_step(kinds, tmp_path / "other.ckpt", 3)
    assert names(Search([Place(tmp_path, "hpc_ckpt_*")])) == ["hpc_ckpt_2.ckpt"]


class Attack:
    """Leaves a mark when it is unpickled in the usual way."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_looking_into_a_file_runs_nothing_of_it(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "a.ckpt"
    torch.save({"global_step": 3, "lr_schedulers": [], "optimizer_states": [Attack(mark)], "x": {Attack(mark)}}, path)
    top = contents(path)
    assert top.step == 3
    assert holds_whole_state(top.keys, directory=False)
    assert not mark.exists()
    path.write_bytes(pickle.dumps(Attack(mark)))
    with pytest.raises(CorruptCheckpointError, match="expected a checkpoint, found BadZipFile"):
        contents(path)
    assert not mark.exists()
