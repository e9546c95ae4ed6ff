"""A new run begins with the weights of any checkpoint: of any form and layout, whole states or weights alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import in_full, selected
from helpers.checkpoint_runs import fit, whole_weights
from torch import Tensor

from lightning_tex.cli import main
from lightning_tex.errors import UserError
from lightning_tex.testing.ranks import run_ranks

TED = {"tensor_parallel_size": 2}
SOURCES = ("directory", "plain", "whole", "weights")
# Layout, precision: parameters in fp32; with masters in two formats; without.
RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "32-true": (TED, "32-true"),
    "masters": ({"zero_stage": 2}, "bf16-mixed"),
    "split": ({"optimizer_state_format": "split"}, "bf16-mixed"),
    "no masters": (TED, "bf16-true"),
}
FEW = ("split",)


def _masters(run: Any, module: Any) -> dict[str, Tensor]:
    """Every element's exact value as one process would hold it: the master where there is one."""
    return whole_weights(run, module) | {
        name: value
        for name, value in run.strategy.lightning_module_state_dict().items()
        if isinstance(value, Tensor) and name in dict(module.named_parameters())
    }


def _begin(source: str, layout: dict[str, Any], precision: str) -> dict[str, Any]:
    """The values that a run begins with, and its first loss."""
    layout = {**layout, "save_distributed_checkpoint": False, "init_from": source}
    found = fit(layout, 2, 1, precision=precision, model={"seed": 8}, max_steps=0, then=_masters)
    return {"values": found["then"], "seen": found["seen"]}


def _everything(folder: str, names: list[str]) -> dict[str, Any]:
    original = fit(TED, 2, 1, save=f"{folder}/directory.ckpt")
    fit({**TED, "save_distributed_checkpoint": False}, 2, 1, save=f"{folder}/plain.ckpt")
    if torch.distributed.get_rank() == 0:
        main(["checkpoint", "consolidate", f"{folder}/directory.ckpt", "--output", f"{folder}/whole.ckpt"])
        words = ["--output", f"{folder}/weights.ckpt", "--weights_only"]
        main(["checkpoint", "consolidate", f"{folder}/directory.ckpt", *words])
    torch.distributed.barrier()
    found: dict[str, Any] = {"original": original}
    for name in names:
        for source in SOURCES:
            found[f"{name} from {source}"] = _begin(f"{folder}/{source}.ckpt", *RUNS[name])
    both = fit({**TED, "init_from": f"{folder}/weights.ckpt"}, 2, 2, ckpt_path=f"{folder}/directory.ckpt")
    alone = fit(TED, 2, 2, ckpt_path=f"{folder}/directory.ckpt")
    found["resumed"] = both["losses"], alone["losses"]
    try:
        fit({"init_from": f"{folder}/missing.ckpt"}, 2, 1)
    except UserError as error:
        found["missing"] = str(error)
    return found


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    names = [name for name in RUNS if name in selected(request, "name")]
    return run_ranks(2, _everything, str(tmp_path_factory.mktemp("init from")), names)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", in_full(RUNS, FEW))
def test_a_run_begins_with_the_weights_as_exactly_as_they_were_saved(
    ranks: list[dict[str, Any]], name: str, source: str
) -> None:
    original = ranks[0]["original"]
    begun = ranks[0][f"{name} from {source}"]
    assert begun["seen"] == original["seen"]
    for parameter, value in original["weights"].items():
        expected = value.bfloat16() if name == "no masters" and value.dim() > 1 else value
        assert torch.equal(begun["values"][parameter].to(expected.dtype), expected), parameter


def test_what_is_resumed_goes_before_it(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        both, alone = rank["resumed"]
        assert both == alone


def test_a_source_that_is_missing_is_named(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "there is no checkpoint" in rank["missing"]
        assert "missing.ckpt" in rank["missing"]
