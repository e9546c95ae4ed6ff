"""An infinity or NaN on one rank: the same decision on all, a message, and an end that names where it arose."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers.nonfinite_runs import replayed, spoilt_fit

from lightning_tex.parallel.device import pretend_device
from lightning_tex.testing.ranks import run_ranks

RANK = 1  # tensor 1 of data 0; expert 0 of expert_tensor 1: experts 0 and 1 of 4

# What is spoilt, and what must be said of it.
ORIGINS = {
    "expert": r"output of expert 1 of \S+experts \(Experts\) on rank\(s\) 1, whose parameter \S+up of expert 1",
    "router": r"of \S+router \(SoftmaxRouter\) on rank\(s\) 1, whose parameter \S+router.weight is not finite",
    "activation": r"output of decoder.norm \(\w+\) on rank\(s\) 1;",
    "loss": r"the loss on rank\(s\) 1; batch \d of data rank 0",
    "gradient": r"gradient at the output of decoder.norm \(RMSNorm\) on rank\(s\) 1;",
}
DEFAULT = ("expert",)


def stopped(folder: str, what: str) -> dict[str, Any]:
    return spoilt_fit(folder, (what, RANK, 2, 99), 9, max_skipped_steps=2)


@pytest.mark.parametrize(
    "what", [what if what in DEFAULT else pytest.param(what, marks=pytest.mark.faults) for what in ORIGINS]
)
def test_the_end_names_where_it_arose_and_the_dump_shows_it_again(
    what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = run_ranks(4, stopped, str(tmp_path), what)
    said = {own["said"] for own in ended}
    assert len(said) == 1 and [own["skipped"] for own in ended] == [2] * 4
    (text,) = said
    assert "each of the last 2 steps" in text and "in step 4" in text
    assert re.search(ORIGINS[what], text), text
    messages = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lightning_tex: step")]
    assert [line.split()[2] for line in messages] == ["3", "4"]
    dump = tmp_path / "nonfinite-step=4"
    assert f"lightning-tex replay {dump}" in text
    report, *others = run_ranks(4, replayed, str(dump))
    assert others == [None] * 3 and report is not None
    assert re.search(ORIGINS[what], report["found"]), report["found"]


def stopped_by_the_device(folder: str, what: str) -> dict[str, Any]:
    with pretend_device("cuda"):
        return stopped(folder, what)


@pytest.mark.parametrize("what", ["gradient", pytest.param("expert", marks=pytest.mark.faults)])
def test_what_devices_have_decided_all_ranks_learn_in_the_next_step(
    what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = run_ranks(4, stopped_by_the_device, str(tmp_path), what)
    said = {own["said"] for own in ended}
    assert len(said) == 1 and [own["skipped"] for own in ended] == [2] * 4
    (text,) = said
    assert "each of the last 2 steps" in text and "in step 4" in text
    messages = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lightning_tex: step")]
    assert [line.split()[2] for line in messages] == ["3", "4"]
    # Both were over before they could be watched, but what they were is kept.
    report, *_ = run_ranks(4, replayed, str(tmp_path / "nonfinite-step=4"))
    assert report is not None and re.search(ORIGINS[what], report["found"]), report


def stopped_under_a_loss_scale(folder: str, what: str, device: str) -> dict[str, Any]:
    with pretend_device(device):
        return spoilt_fit(folder, (what, 1, 2, 99), 9, scale=2.0**8, max_skipped_steps=2)


@pytest.mark.parametrize(
    ("world", "what", "device"),
    [
        (2, "loss", "cpu"),
        pytest.param(4, "activation", "cpu", marks=pytest.mark.faults),
        pytest.param(2, "loss", "cuda", marks=pytest.mark.faults),
    ],
)
def test_a_loss_scale_is_not_to_blame_for_a_loss(
    world: int, what: str, device: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of the ranks whose loss it is one is enough for all; a scale of 256 could fall eight times."""
    ended = run_ranks(world, stopped_under_a_loss_scale, str(tmp_path), what, device)
    said = {own["said"] for own in ended}
    assert len(said) == 1 and [own["skipped"] for own in ended] == [2] * world
    (text,) = said
    origin = ORIGINS[what].replace("data rank 0", f"data rank {RANK if world == 2 else 0}")
    assert "each of the last 2 steps" in text and "in step 4" in text and re.search(origin, text), text
    messages = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lightning_tex: step")]
    assert [line.split()[2] for line in messages] == ["3", "4"]
    report, *_ = run_ranks(world, replayed, str(tmp_path / "nonfinite-step=4"))
    assert report is not None and re.search(origin, report["found"]), report


def once(folder: str) -> dict[str, Any]:
    return spoilt_fit(folder, ("loss", 3, 1, 1), 4)


def test_one_skipped_step_leaves_one_message(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ended = run_ranks(4, once, str(tmp_path))
    assert [(own["said"], own["skipped"]) for own in ended] == [(None, 1)] * 4
    (message,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lightning_tex: step")]
    assert "step 2 is not taken" in message and "the loss on rank(s) 3; batch 1 of data rank 1" in message
