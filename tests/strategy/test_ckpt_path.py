"""What ``ckpt_path`` resumes from: words, damage, weights, on all ranks alike and never silently from nothing."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.checkpoint_runs import BATCH, Data, Model, fit, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks.on_exception_checkpoint import OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger

import lightning_tex as tex
from lightning_tex.testing.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

TED = {"tensor_parallel_size": 2}
EPOCH = Data().samples // BATCH


class Begins(L.Callback):
    """The optimizer steps done when training began."""

    step = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step = trainer.global_step


def saving(folder: str, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", **{"save_last": True, "save_top_k": -1, "every_n_epochs": 1, **options})


def begun(folder: str, epochs: int, ckpt_path: str | None, callbacks: list[L.Callback] | None = None) -> Any:
    """The step that a fit into this folder begins with; or the error."""
    begins = Begins()
    used = [saving(folder)] if callbacks is None else callbacks
    run = trainer(tex.TexMoEStrategy(**TED), 2, epochs, callbacks=[begins, *used], default_root_dir=f"{folder}/root")
    try:
        run.fit(Model(), Data(), ckpt_path=ckpt_path)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return begins.step


def on_first_rank(act: Callable[[], object]) -> None:
    torch.distributed.barrier()
    if os.environ["RANK"] == "0":
        act()
    torch.distributed.barrier()


def flip(path: Path) -> None:
    """Damage that only digests tell."""
    file = next(path.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@contextmanager
def told(lines: list[str]) -> Any:
    """What Lightning says to the user meanwhile, in rank 0's process."""

    class Keeps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("lightning.pytorch.utilities.rank_zero"), Keeps()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        lines += [str(warning.message) for warning in warned]


def everything(folder: str) -> dict[str, Any]:
    place, anew, lines = Path(folder), [], []
    with told(anew):
        found: dict[str, Any] = {"nothing, last": begun(folder, 1, "last"), "nothing, auto": begun(folder, 1, "auto")}
    with told(lines):
        found["first run of two"] = begun(folder, 2, "auto")
        found["second run begins anew"] = begun(folder, 1, None)  # writes last-v1.ckpt, with fewer steps
        found["after both"] = begun(folder, 3, "last")
        newest = place / f"step={3 * EPOCH}.ckpt"
        on_first_rank(lambda: flip(newest))
        on_first_rank(lambda: flip(place / "last.ckpt"))
        found["digests"] = begun(folder, 4, "last")
        found["explicit"] = begun(folder, 4, str(newest))
    return found | {"anew": anew, "lines": lines}


def only(folder: str, make: Callable[[Path], None], *words: str) -> list[Any]:
    """What fits say where a folder has only what ``make`` puts there."""
    torch.distributed.barrier()
    place = Path(folder)
    on_first_rank(lambda: (place.mkdir(), make(place)))
    return [begun(folder, 2, word) for word in words]


def weights(folder: str) -> dict[str, Any]:
    """From a whole directory of one run: weights of all kinds, begun from or refused."""
    source = fit(TED, 2, 1, save=f"{folder}/whole.ckpt", precision="bf16-true")
    run = trainer(tex.TexMoEStrategy(**TED), 2)
    module = Model()
    run.fit(module, Data())
    run.save_checkpoint(f"{folder}/weights.ckpt", weights_only=True)
    found = {"refused": begun(f"{folder}/elsewhere", 1, f"{folder}/weights.ckpt"), "source": source["weights"]}
    only_weights = saving(f"{folder}/only weights", save_weights_only=True)
    begun(f"{folder}/only weights", 1, None, [only_weights])
    found["only weights"] = begun(f"{folder}/only weights", 1, "last")
    again = trainer(tex.TexMoEStrategy(**TED), 2, callbacks=[saving(f"{folder}/only weights")], limit_test_batches=1)
    found["tested"] = len(again.test(Model(), Data(), ckpt_path="last", verbose=False))
    return found


def damaged_only(folder: str) -> dict[str, Any]:
    run = trainer(tex.TexMoEStrategy(**TED), 2)
    run.fit(Model(), Data())
    run.save_checkpoint(f"{folder}/good.ckpt")

    def broken(place: Path) -> None:
        shutil.copytree(f"{folder}/good.ckpt", place / "one.ckpt")
        flip(place / "one.ckpt")
        (place / "two.ckpt").mkdir()

    def dangling(place: Path) -> None:
        (place / "last.ckpt").symlink_to(".last.ckpt.01234567")

    def requeued(place: Path) -> None:
        (place / "root").mkdir()
        shutil.copytree(f"{folder}/good.ckpt", place / "root" / "hpc_ckpt_1.ckpt")

    def failed(place: Path) -> None:
        shutil.copytree(f"{folder}/good.ckpt", place / "on_exception.ckpt")

    found = {
        "broken": only(f"{folder}/broken", broken, "last", "auto"),
        "dangling": only(f"{folder}/dangling", dangling, "last", "auto", f"{folder}/dangling/last.ckpt"),
        "requeued": only(f"{folder}/requeued", requeued, "auto"),
    }
    only(f"{folder}/failed", failed)
    callbacks = [OnExceptionCheckpoint(f"{folder}/failed"), saving(f"{folder}/elsewhere")]
    found["failed"] = begun(f"{folder}/failed", 2, None, callbacks)
    return found


def versions(folder: str) -> list[int]:
    """A command that is given again, whose logger counts its versions."""
    warnings.filterwarnings("ignore", "The dirpath has changed from")
    steps = []
    for epochs, word in ((1, None), (2, "auto"), (3, "last")):
        begins = Begins()
        run = trainer(
            tex.TexMoEStrategy(**TED),
            2,
            epochs,
            callbacks=[begins, ModelCheckpoint()],
            logger=CSVLogger(folder, name="logs"),
            default_root_dir=folder,
            log_every_n_steps=1,
        )
        run.fit(Model(), Data(), ckpt_path=word)
        torch.distributed.barrier()
        steps.append(begins.step)
    return steps


def all_of_it(folder: str) -> dict[str, Any]:
    parts = {"words": everything, "weights": weights, "damaged": damaged_only, "versions": versions}
    return {name: part(f"{folder}/{name}") for name, part in parts.items()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, all_of_it, str(tmp_path_factory.mktemp("ckpt path")))


def test_last_is_an_error_where_there_is_nothing_and_auto_begins_anew(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        text = rank["words"]["nothing, last"]
        assert text.startswith("UserFileError: ckpt_path='last': there is no whole state in ")
        assert "/words/*, " in text
        assert "legal: ckpt_path='auto'" in text
        assert rank["words"]["nothing, auto"] == 0
    anew, lines = ranks[0]["words"]["anew"], ranks[0]["words"]["lines"]
    assert any("so a new run begins" in line for line in anew)
    assert not any("Restored all states" in line for line in anew)
    restored = [line.rpartition("/")[2] for line in lines if "Restored all states" in line]
    assert restored == ["last.ckpt", "last.ckpt", f"step={2 * EPOCH}.ckpt"]


def test_the_newest_is_found_after_second_runs_in_one_folder(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["words"]["first run of two"] == EPOCH
        assert rank["words"]["second run begins anew"] == 0
        assert rank["words"]["after both"] == 2 * EPOCH
    assert any("which has most steps" in line and "was written later" in line for line in ranks[0]["words"]["lines"])


def test_damage_that_digests_tell_is_passed_over_by_name(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["words"]["digests"] == 2 * EPOCH
        assert "RefusedCheckpointError" in rank["words"]["explicit"]
        assert "The newest complete whole state there is " in rank["words"]["explicit"]
    passed = [line for line in ranks[0]["words"]["lines"] if "passed over as damaged" in line]
    assert len(passed) == 1
    assert f"step={3 * EPOCH}.ckpt" in passed[0]


def test_a_fit_never_goes_on_from_weights_alone_and_a_test_may_take_them(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["weights"]
        assert found["refused"].startswith("WeightsOnlyError: ")
        assert "weights.ckpt has no optimizer states" in found["refused"]
        assert "TexMoEStrategy(init_from='" in found["refused"]
        assert "last.ckpt holds weights only" in found["only weights"]
        assert found["tested"] == 1


def test_nothing_but_damaged_ones_is_refused_with_their_names(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for text in rank["damaged"]["broken"]:
            assert "there is nothing but damaged checkpoints" in text
            assert "one.ckpt/__" in text
            assert "two.ckpt/manifest.json" in text


def test_a_link_that_leads_nowhere_never_begins_anew(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for text in rank["damaged"]["dangling"]:
            assert "last.ckpt" in text
            assert "a link to .last.ckpt.01234567, where there is nothing" in text


def test_what_slurm_or_an_exception_left_is_gone_on_from(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["damaged"]["requeued"] == [EPOCH]
        assert rank["damaged"]["failed"] == EPOCH


def test_a_logger_that_counts_versions_does_not_hide_the_run_before(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["versions"] == [0, EPOCH, 2 * EPOCH]
