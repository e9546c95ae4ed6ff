"""No room and no right to write: errors with path, bytes and reason, in time."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from helpers.checkpoint_runs import Data, Model, trainer
from helpers.guarded_steps import CASES, made, step
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_tex as tex
from lightning_tex.errors import UserError
from lightning_tex.parallel.topology import Axis
from lightning_tex.saving import archive, consolidated
from lightning_tex.saving.archive import NewFile, write_tensors
from lightning_tex.saving.disk import require_writable
from lightning_tex.saving.global_tensor import GlobalTensor
from lightning_tex.saving.optimizer_state import foreseen_bytes, optimizer_state
from lightning_tex.testing.ranks import run_ranks

LEGAL = "a folder that all ranks see and may write to"


class FullDisk:
    """A file on a file system that has room for some bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(data)
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = NewFile.__init__

    def on_full_disk(self: NewFile, *arguments: Any) -> None:
        begin(self, *arguments)
        self._file = FullDisk(self._file, 1000)  # type: ignore[assignment]

    monkeypatch.setattr(archive.NewFile, "__init__", on_full_disk)


def test_a_full_disk_in_the_midst_of_a_tensor_is_named_with_bytes(tmp_path: Path, full_disk: None) -> None:
    path = tmp_path / "__0_0.distcp"
    whole = GlobalTensor.whole(torch.zeros(5000))
    with pytest.raises(OSError, match="No space left on device") as raised:
        write_tensors(NewFile(path, 20_000), {("model", "weight"): whole})
    assert raised.value.errno == errno.ENOSPC
    assert f"{path} needs 20,000 bytes, " in str(raised.value)
    assert "are free there" in str(raised.value)


def _plain_on_full_disk(folder: str) -> str:
    strategy = tex.TexMoEStrategy(save_distributed_checkpoint=False)
    run = trainer(strategy, 1)
    run.fit(Model(), Data())

    def full(checkpoint: Any, path: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    strategy.checkpoint_io.save_checkpoint = full  # type: ignore[method-assign]
    try:
        run.save_checkpoint(f"{folder}/a.ckpt")
    except OSError as error:
        return str(error)
    return ""


def test_a_full_disk_is_named_for_a_plain_file_too(tmp_path: Path) -> None:
    text = run_ranks(1, _plain_on_full_disk, str(tmp_path))[0]
    assert f"No space left on device; {tmp_path}/a.ckpt needs " in text


def unwritable(folder: Path) -> Path:
    place = folder / "read only"
    place.mkdir(mode=0o500)
    return Path("/proc/sys/kernel") if os.access(place, os.W_OK) else place  # the superuser may write anywhere but here


def test_a_folder_that_may_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / ".probe.78b093d2.partial").write_text("of a rank that was killed in it")
    require_writable([tmp_path / "there", tmp_path / "new" / "deep"], True, Axis("world"), lambda value: value)
    assert [entry.name for entry in tmp_path.rglob("*")] == ["there"]


def test_a_folder_that_cannot_be_written_or_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (unwritable(tmp_path), tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=LEGAL) as raised:
            require_writable([folder], True, Axis("world"), lambda value: value)
        assert f"rank 0: {folder}: " in str(raised.value)


class Steps(Model):
    taken = 0

    def training_step(self, batch: Any, index: int) -> Any:
        self.taken += 1
        return super().training_step(batch, index)


def _begin_to_fit(folder: str) -> tuple[str, int]:
    module = Steps()
    run = trainer(tex.TexMoEStrategy(), 2, callbacks=[ModelCheckpoint(folder)])
    try:
        run.fit(module, Data())
    except UserError as error:
        return str(error), module.taken
    return "", module.taken


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_it_is_found_before_the_first_step_on_all_ranks(tmp_path: Path) -> None:
    place = unwritable(tmp_path)
    for text, steps in run_ranks(2, _begin_to_fit, str(place)):
        assert text.startswith(f"checkpoints cannot be saved: rank 0: {place}: ")
        assert f"rank 1: {place}: " in text
        assert steps == 0


class Room(NamedTuple):
    free: int


class SavesOneWeight(Steps):
    """As adapters beside a published model do."""

    strict_loading = False

    def checkpointed_names(self) -> set[str]:
        return {"scale"}


def _fit_with_room(folder: str, free: int, kind: type[Steps]) -> tuple[str, int, int]:
    """What ends it, steps taken, and bytes of the tensors in a checkpoint."""
    module = kind()
    with mock.patch("shutil.disk_usage", return_value=Room(free)):
        run = trainer(tex.TexMoEStrategy(), 2, callbacks=[ModelCheckpoint(folder, save_top_k=1)])
        try:
            run.fit(module, Data())
        except UserError as error:
            return str(error), module.taken, 0
    (checkpoint,) = Path(folder).glob("*.ckpt")
    whole = consolidated(checkpoint)
    tensors = [*whole["state_dict"].values()]
    tensors += [t for states in whole["optimizer_states"][0]["state"].values() for t in states.values()]
    return "", module.taken, sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("kind", [Steps, SavesOneWeight])
def test_a_disk_without_room_for_a_checkpoint_is_found_before_the_first_step(tmp_path: Path, kind: type[Steps]) -> None:
    (_, taken, size), _ = run_ranks(2, _fit_with_room, str(tmp_path / "roomy"), 10**12, kind)
    assert taken > 1
    for text, steps, _ in run_ranks(2, _fit_with_room, str(tmp_path / "full"), 1000, kind):
        told = re.match(r"checkpoints cannot be saved: .* of this run takes ([\d,]+) bytes, and (\S+) has", text)
        assert told is not None and told[2] == str(tmp_path / "full"), text
        assert steps == 0 and int(told[1].replace(",", "")) == size


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_states_are_foreseen_to_the_byte(kind: str, form: str) -> None:
    model, optimizer = made(kind, form, torch.device("cpu"))
    foreseen = foreseen_bytes(optimizer)
    step(model, optimizer, 0)
    states = [tensor for named in optimizer_state(optimizer).values() for tensor in named.values()]
    written = sum(part.extent.numel * tensor.dtype.itemsize for tensor in states for part in tensor.parts)
    assert foreseen == foreseen_bytes(optimizer) == written
