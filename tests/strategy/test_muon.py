"""Muon and AdamW under the Trainer, as one optimizer and as two: as in one process, saved on one layout for another."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cases import in_full
from helpers.checkpoint_runs import LAYOUTS, TOLERANCE, largest_difference
from helpers.layout_grid import layouts
from helpers.muon_runs import fit
from helpers.ranks import together
from torch import Tensor

from lightning_tex.saving.consolidate import consolidated

CASES = [("one", "64-true"), ("two", "64-true"), ("two in full precision", "32-true")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Any, dict[str, Tensor]]]:
    """Parameters of one process without the strategy, by kind and precision."""
    folder = tmp_path_factory.mktemp("alone")
    runs = {
        (kind, precision): fit(kind, None, 1, precision, save=f"{folder}/{kind} {precision}.ckpt")
        for kind, precision in CASES
    }
    return folder, runs


@pytest.mark.parametrize("world", in_full([1, 2, 4], [2]))
def test_they_step_as_in_one_process(alone: Any, world: int) -> None:
    own = [(name, layout) for name, (size, layout) in LAYOUTS.items() if size == world]
    cases = {
        (name, *case): (fit, case[0], layout, world, case[1])
        for (name, layout), case in zip(own, CASES, strict=False)  # every combination is in the full grid
    }
    for (_, kind, precision), by_rank in together(world, cases).items():
        for weights in by_rank:
            assert largest_difference(weights, alone[1][kind, precision]) < TOLERANCE[precision]


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2, 4])
def test_they_step_as_in_one_process_on_every_layout(alone: Any, world: int) -> None:
    cases = {}
    for number, sizes in enumerate(sizes for sizes in layouts() if sizes.world == world):
        layout = {
            "tensor_parallel_size": sizes.tensor,
            "expert_parallel_size": sizes.expert,
            "expert_tensor_parallel_size": sizes.expert_tensor,
            "zero_stage": number % 3,
        }
        cases |= {(sizes, kind, precision): (fit, kind, layout, world, precision) for kind, precision in CASES}
    assert len(cases) >= (3 if world == 1 else 9)
    for (_, kind, precision), by_rank in together(world, cases, timeout=600).items():
        for weights in by_rank:
            assert largest_difference(weights, alone[1][kind, precision]) < TOLERANCE[precision]


def test_accumulation_is_of_the_sums_of_gradients() -> None:
    expected = accumulated("one", None, 1, "64-true")
    layout = LAYOUTS["expert, ZeRO 2"][1]
    for weights in together(2, {"accumulated": (accumulated, "one", layout, 2, "64-true")})["accumulated"]:
        assert largest_difference(weights, expected) < 1e-10


def accumulated(*arguments: Any) -> dict[str, Tensor]:
    return fit(*arguments, accumulate_grad_batches=2)


FEW = ["alone", "plain, ZeRO 0", "tensor"]
ALL = ["alone", "TED", "plain, ZeRO 0", "expert, ZeRO 2", "tensor"]


@pytest.mark.parametrize("names", in_full([ALL, FEW], [FEW]), ids=len)
def test_they_go_on_from_another_layout_and_form(alone: Any, tmp_path: Path, names: list[str]) -> None:
    folder, _ = alone
    # At once: strategy="auto" would read weights into fp32 before they are fp64.
    expected = fit("one", None, 1, "64-true", 5)
    sources = {"alone": folder / "one 64-true.ckpt", **{name: tmp_path / f"{name}.ckpt" for name in LAYOUTS}}
    for source, name in pairwise(names):
        world, layout = LAYOUTS[name]
        cases = {
            "saved": (fit, "one", layout, world, "64-true", 3, None, str(sources[name])),
            "resumed": (fit, "one", layout, world, "64-true", 5, str(sources[source])),
        }
        for weights in together(world, cases)["resumed"]:
            assert largest_difference(weights, expected) < 1e-10
    first = torch.load(sources["alone"], weights_only=True)["optimizer_states"]
    plain = torch.load(sources["plain, ZeRO 0"], weights_only=True)["optimizer_states"]
    for found in (plain, consolidated(sources[names[-1]])["optimizer_states"]):
        assert_equal_states(found[0], first[0])


def assert_equal_states(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["state"].keys() == expected["state"].keys()
    for number, state in expected["state"].items():
        assert found["state"][number].keys() == state.keys()
        for key, value in state.items():
            torch.testing.assert_close(torch.as_tensor(found["state"][number][key]), value, rtol=1e-9, atol=1e-12)
