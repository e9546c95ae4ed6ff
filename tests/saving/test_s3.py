"""Checkpoints on ``s3://``, where s3fs and moto's server are installed: two ranks, two layouts, a changed byte."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
import torch
from fsspec.config import conf
from helpers.checkpoint_runs import EPOCH, fit
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_tex.cli import main
from lightning_tex.saving import CorruptCheckpointError, at, consolidated, latest, retrying
from lightning_tex.saving.remote_store import RemoteStore
from lightning_tex.testing.ranks import run_ranks

MISSING = [name for name in ("s3fs", "moto", "flask") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("default::DeprecationWarning"),
]

FOLDER = "s3://bucket/run"
TENSOR = {"tensor_parallel_size": 2, "tile_size": 256}
RANDOM = {"dropout": 0.1, "noise": True}


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    conf["s3"] = {"key": "test", "secret": "test", "endpoint_url": f"http://127.0.0.1:{port}"}
    try:
        run_ranks(1, _make_bucket, port)
        yield
    finally:
        conf.pop("s3")
        process.terminate()
        process.wait()


def _make_bucket(port: int) -> None:
    """Once the server answers; in a process of its own, since ranks must not inherit a client's threads."""
    for _ in range(600):
        with socket.socket() as connection:
            if connection.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    fsspec.filesystem("s3").mkdir("bucket")


def run(folder: str | None, epochs: int, ckpt_path: str | None = None, seed: int = 5) -> dict[str, Any]:
    RemoteStore.part_bytes = 20_000  # several objects of a rank
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_last=True, save_top_k=-1)
    callbacks = [] if folder is None else [saves]
    return fit(TENSOR, 2, epochs, ckpt_path, model=RANDOM, callbacks=callbacks, seed=seed)


def _on_two_ranks() -> tuple[dict[str, Any], ...]:
    return run(None, 3), run(FOLDER, 2, "auto"), run(FOLDER, 3, "auto", seed=6)


@pytest.fixture(scope="module")
def two_ranks(server: None) -> list[Any]:
    return run_ranks(2, _on_two_ranks, timeout=300)


def test_a_run_goes_on_bit_equal(two_ranks: list[Any]) -> None:
    for unbroken, _, resumed in two_ranks:
        assert resumed["losses"] == unbroken["losses"][2 * EPOCH :]
        assert torch.equal(resumed["own"], unbroken["own"])


def test_commands_and_another_layout_read_it(two_ranks: list[Any]) -> None:
    weights, steps = run_ranks(1, _on_one)[0]
    for name, value in two_ranks[0][2]["weights"].items():
        assert torch.equal(weights[name], value)
    assert steps == 1


def _on_one() -> tuple[dict[str, Any], int]:
    path = str(latest(FOLDER))
    for words in (["inspect", path], ["inspect", FOLDER], ["verify", path], ["consolidate", path]):
        main(["checkpoint", *words])
    resumed = fit({}, 1, 4, f"{FOLDER}/step=4.ckpt")
    assert len(list((at(path).resolve()).iterdir())) > 8
    return consolidated(path)["state_dict"], int(len(resumed["losses"]) > 0)


def test_a_changed_byte_is_refused(two_ranks: object) -> None:
    said = run_ranks(1, _changed)[0]
    assert "__1_0.distcp: expected xxh3_128" in said
    assert f"The newest complete whole state there is {FOLDER}/" in said


def _changed() -> str:
    retrying.FIRST_WAIT_S = 0
    part = at(f"{FOLDER}/step=5.ckpt").resolve() / "__1_0.distcp"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(bytes(content))
    try:
        fit({}, 1, 4, f"{FOLDER}/step=5.ckpt")
    except CorruptCheckpointError as error:
        return str(error)
    return "loaded"
