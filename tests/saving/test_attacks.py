"""Nothing in a checkpoint is ever run: payloads wherever a pickle could hide, with all digests forged to fit."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoint_runs import Data, Model, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

import lightning_tex as tex
from lightning_tex.cli import main
from lightning_tex.errors import UserTypeError
from lightning_tex.saving.manifest import MANIFEST, Manifest, file_record
from lightning_tex.strategy.step_dump import Dump
from lightning_tex.testing.ranks import run_ranks


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


def forge(folder: Path) -> None:
    """Write a manifest under which every file is what it should be."""
    old = Manifest.from_bytes((folder / MANIFEST).read_bytes(), folder)
    names = [file.name for file in folder.iterdir() if file.name != MANIFEST]
    files = {name: file_record(folder / name) for name in names}
    forged = Manifest(old.step, old.epoch, old.layout, old.versions, old.written, files)
    (folder / MANIFEST).write_bytes(forged.to_bytes())


def in_rest(*keys: str) -> Callable[[Path, Path], None]:
    """A payload somewhere in meta.pt."""

    def act(folder: Path, mark: Path) -> None:
        rest = torch.load(folder / "meta.pt", weights_only=True)
        inner = rest
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = Payload(mark)
        torch.save(rest, folder / "meta.pt")

    return act


def rest_as_pickle(folder: Path, mark: Path) -> None:
    (folder / "meta.pt").write_bytes(pickle.dumps(Payload(mark)))


def rest_as_old_torch_file(folder: Path, mark: Path) -> None:
    torch.save(Payload(mark), folder / "meta.pt", _use_new_zipfile_serialization=False)


def rest_as_tar(folder: Path, mark: Path) -> None:
    with tarfile.open(folder / "meta.pt", "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Payload(mark))
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def dcp_metadata(folder: Path, mark: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(mark)))


def dcp_byte_item(folder: Path, mark: Path) -> None:
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    name = next(iter(metadata.state_dict_metadata))
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    tensors_as_pickle(folder, mark)


def tensors_as_pickle(folder: Path, mark: Path) -> None:
    for file in folder.glob("*.distcp"):
        size = file.stat().st_size
        file.write_bytes(pickle.dumps(Payload(mark)).ljust(size, b"."))


def tensor_archive(folder: Path, mark: Path) -> None:
    """The pickle inside the first archive, replaced in its place; the elements stay."""
    for file in folder.glob("*.distcp"):
        content = bytearray(file.read_bytes())
        payload = pickle.dumps(Payload(mark), protocol=2)
        at = content.index(b"\x80\x02")
        content[at : at + len(payload)] = payload
        file.write_bytes(content)


def index_as_pickle(folder: Path, mark: Path) -> None:
    (folder / "tensors.json").write_bytes(pickle.dumps(Payload(mark)))


def index_leads_outside(folder: Path, mark: Path) -> None:
    text = (folder / "tensors.json").read_text()
    (folder / "tensors.json").write_text(text.replace("__0_0.distcp", "../outside"))


def manifest_as_pickle(folder: Path, mark: Path) -> None:
    (folder / MANIFEST).write_bytes(pickle.dumps(Payload(mark)))


def extra_files(folder: Path, mark: Path) -> None:
    for name in ("data.pkl", "optimizer.pt", "__9_0.distcp", "sitecustomize.py"):
        (folder / name).write_bytes(pickle.dumps(Payload(mark)))


ATTACKS: dict[str, Callable[[Path, Path], None]] = {
    "callback state": in_rest("callbacks", "ModelCheckpoint"),
    "loop state": in_rest("loops", "fit_loop", "state_dict"),
    "optimizer options": in_rest("lightning_tex", "optimizer", "param_groups"),
    "dice": in_rest("lightning_tex", "optimizer", "dice"),
    "scheduler state": in_rest("lr_schedulers"),
    "data state": in_rest("Data"),
    "hyper-parameters": in_rest("hyper_parameters", "seed"),
    "meta.pt a pickle": rest_as_pickle,
    "meta.pt an old torch file": rest_as_old_torch_file,
    "meta.pt a tar": rest_as_tar,
    ".metadata": dcp_metadata,
    "byte item": dcp_byte_item,
    "tensor file a pickle": tensors_as_pickle,
    "pickle of a tensor": tensor_archive,
    "index a pickle": index_as_pickle,
    "index leads outside": index_leads_outside,
    "manifest a pickle": manifest_as_pickle,
    "files nobody asked for": extra_files,
}
# What leaves every byte that is read in its place is loaded, and still not run.
HARMLESS = {".metadata", "pickle of a tensor", "files nobody asked for"}


def fit(path: Path, callbacks: list[Any]) -> None:
    trainer(tex.TexMoEStrategy(), 1, 2, callbacks=callbacks).fit(Model(), Data(), ckpt_path=str(path))


def attack(folder: str) -> dict[str, Any]:
    # As a user might have it set for other tools.
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    run = trainer(tex.TexMoEStrategy(), 1, callbacks=[ModelCheckpoint(f"{folder}/own", save_top_k=0)])
    run.fit(Model(), Data())
    source = Path(folder, "source.ckpt")
    run.save_checkpoint(source)
    found: dict[str, Any] = {}
    for name, act in ATTACKS.items():
        victim, mark = Path(folder, "victim.ckpt"), Path(folder, f"executed {name}")
        shutil.rmtree(victim, ignore_errors=True)
        shutil.copytree(source, victim)
        act(victim, mark)
        if "manifest" not in name:
            forge(victim)
        uses = {
            "load": lambda: run.strategy.load_checkpoint(str(victim)),  # noqa: B023
            "fit": lambda: fit(victim, [ModelCheckpoint(f"{folder}/own", save_top_k=0)]),  # noqa: B023
            "module": lambda: tex.load_from_checkpoint(Model, victim),  # noqa: B023
            **{
                word: lambda word=word: main(["checkpoint", word, str(victim), "--json"])  # noqa: B023
                for word in ("inspect", "verify", "consolidate")
            },
        }
        outcomes = {}
        for use, act_on in uses.items():
            try:
                act_on()
                outcomes[use] = "done"
            except (Exception, SystemExit) as error:
                outcomes[use] = f"{type(error).__name__}: {error}"
            Path(folder, "whole-of-victim.ckpt").unlink(missing_ok=True)
        found[name] = outcomes, mark.exists()
    return found


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(1, attack, str(tmp_path_factory.mktemp("attacks")))[0]


@pytest.mark.parametrize("name", ATTACKS)
def test_a_payload_is_never_run(attacked: dict[str, Any], name: str) -> None:
    outcomes, executed = attacked[name]
    assert not executed
    for use in ("load", "fit"):
        assert (outcomes[use] == "done") == (name in HARMLESS), outcomes


def test_the_payloads_would_run_if_they_were_unpickled(tmp_path: Path) -> None:
    torch.save({"a": Payload(tmp_path / "mark")}, tmp_path / "file.pt")
    with zipfile.ZipFile(tmp_path / "file.pt") as archive:
        assert any(name.endswith("data.pkl") for name in archive.namelist())
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "mark").exists()
    assert json.dumps(sorted(HARMLESS - ATTACKS.keys())) == "[]"


def plain_file(folder: str) -> Any:
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    run = trainer(tex.TexMoEStrategy(save_distributed_checkpoint=False), 1)
    run.fit(Model(), Data())
    path, mark = Path(folder, "plain.ckpt"), Path(folder, "mark")
    run.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "more": Payload(mark)}, path)
    said = ""
    try:
        fit(path, [])
    except ValueError as error:
        said = str(error)
    before = mark.exists()
    run.strategy.load_checkpoint(str(path), weights_only=False)
    return said, before, mark.exists()


def test_a_plain_file_runs_only_where_the_user_says_so(tmp_path: Path) -> None:
    said, before, after = run_ranks(1, plain_file, str(tmp_path))[0]
    assert "cannot be loaded safely" in said
    assert (before, after) == (False, True)


@pytest.mark.parametrize("name", ["data-rank=0.pt", "hparams.pt"])
def test_a_dumped_step_runs_nothing_unless_it_is_asked_to(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "about.json").write_text(json.dumps({"module": {"name": "Linear", "import": "torch.nn", "file": None}}))
    (tmp_path / "state.ckpt").mkdir()
    torch.save({"batches": [{"input_ids": torch.arange(3)}, (1.0, ["text"])]}, tmp_path / "data-rank=1.pt")
    torch.save({"batches": [Payload(mark)]}, tmp_path / name)
    dump = Dump.read(tmp_path)
    first, second = dump.batches(1)
    assert torch.equal(first["input_ids"], torch.arange(3)) and second == (1.0, ["text"])
    with pytest.raises(UserTypeError, match="legal for a dump of your own: --unpickle"):
        dump.batches(0) if name.startswith("data") else dump.module()
    assert not mark.exists()
    Dump.read(tmp_path, unpickles=True)._loaded(name)
    assert mark.exists()
