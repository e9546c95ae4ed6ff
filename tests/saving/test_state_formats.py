"""Checkpoints of every state format and ZeRO stage: resumed bit-equal, read by the others and on other layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cases import in_full
from helpers.checkpoint_runs import EPOCH, fit, tensors
from lightning.pytorch.plugins import MixedPrecision

from lightning_tex.testing.ranks import run_ranks

TED = {"tensor_parallel_size": 2, "expert_parallel_size": 2, "tile_size": 256}
DATA = {"tensor_parallel_size": 2, "expert_parallel_size": 1}
FOLDING = {"tensor_parallel_size": 2, "expert_tensor_parallel_size": 1, "expert_parallel_size": 4}
RANDOM = {"dropout": 0.1, "noise": True}
KINDS: dict[str, dict[str, Any]] = {
    "split": {"optimizer_state_format": "split"},
    "int8": {"optimizer_state_format": "int8"},
    "stochastic": {"optimizer_state_format": "stochastic"},
    "zero 0": {"zero_stage": 0},
    "zero 2": {"zero_stage": 2},
}


def _resumed(folder: str, kind: str) -> Any:
    layout = {**TED, **KINDS[kind]}
    for form, options in (("directory", {}), ("plain", {"save_distributed_checkpoint": False})):
        path = f"{folder}/{kind} {form}.ckpt"
        fit({**layout, **options}, 4, 1, save=path, precision="bf16-mixed", model=RANDOM)
    whole = fit(layout, 4, 2, precision="bf16-mixed", model=RANDOM)
    again = fit(layout, 4, 2, f"{folder}/{kind} directory.ckpt", precision="bf16-mixed", model=RANDOM, seed=6)
    for name, other in (("data", DATA), ("folding", FOLDING)):
        other = {**other, **KINDS[kind]}
        save = f"{folder}/{kind} {name}.ckpt"
        fit(other, 4, 1, f"{folder}/{kind} directory.ckpt", save, precision="bf16-mixed", model={"seed": 4})
    save = f"{folder}/{kind} of plain.ckpt"
    fit(layout, 4, 1, f"{folder}/{kind} plain.ckpt", save, precision="bf16-mixed", model={"seed": 4})
    fit(TED, 4, 1, f"{folder}/{kind} directory.ckpt", f"{folder}/{kind} as fp32.ckpt", precision="bf16-mixed")
    return whole, again


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("formats")


@pytest.mark.parametrize("kind", in_full(KINDS, ("int8",)))
def test_resumed_bit_equal_and_read_everywhere(folder: Path, kind: str) -> None:
    for whole, resumed in run_ranks(4, _resumed, str(folder), kind, detail=False):
        assert resumed["losses"] == whole["losses"][EPOCH:]
        assert torch.equal(resumed["own"], whole["own"])
    saved = tensors(folder / f"{kind} directory.ckpt")
    assert ("decoder.head.weight.master" in saved or "decoder.embedding.weight.master" in saved) == (
        kind != "stochastic"
    )
    assert saved["decoder.embedding.weight.exp_avg"].dtype == torch.float32
    # The narrow parts that folding leaves of a row have other blocks, with other scales.
    exact = ["data", "of plain", "as fp32", *(["folding"] if kind != "int8" else [])]
    for name in exact:
        again = tensors(folder / f"{kind} {name}.ckpt")
        different = [key for key in saved if key in again and not torch.equal(saved[key], again[key])]
        assert not different, (name, different)
        assert saved.keys() <= again.keys()
    again = tensors(folder / f"{kind} folding.ckpt")
    assert all(torch.equal(saved[key], again[key]) for key in saved if "exp_avg" not in key)
    near = [(again[key] - saved[key]).norm() <= 0.05 * saved[key].norm() for key in saved if "exp_avg" in key]
    assert near and all(near)


def _scaled(folder: str) -> Any:
    def plugin() -> list[MixedPrecision]:
        return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3))]

    def scale(run: Any, module: Any) -> tuple[float, int]:
        scaler = run.precision_plugin.scaler
        return scaler.get_scale(), scaler._get_growth_tracker()

    path = f"{folder}/fp16.ckpt"
    options: dict[str, Any] = {"precision": None, "model": RANDOM, "then": scale}
    whole = fit(TED, 4, 2, plugins=plugin(), **options)
    fit(TED, 4, 1, save=path, plugins=plugin(), **options)
    return whole, fit(TED, 4, 2, path, plugins=plugin(), seed=6, **options)


def test_the_loss_scale_goes_on(folder: Path) -> None:
    for whole, resumed in run_ranks(4, _scaled, str(folder), detail=False):
        assert resumed["then"] == whole["then"] != (2.0**20, 0)
        assert resumed["losses"] == whole["losses"][EPOCH:]
        assert torch.equal(resumed["own"], whole["own"])
