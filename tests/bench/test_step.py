"""``lightning-tex bench step``: whose time it is, and what is left behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_recipe
from torch import nn

from lightning_tex.bench import moments
from lightning_tex.bench.part_timeline import COMMUNICATION, Part, PartTimeline
from lightning_tex.cli import main
from lightning_tex.parallel.flight_record import EVERY_RANK, TRAINING
from lightning_tex.testing.ranks import run_ranks

SIZES = {"dim": 16, "layers": 2, "experts": 2, "vocabulary": tiny_recipe.VOCABULARY, "length": 32, "sequences": 4}


def bench(folder: Path, recipe: Path, *options: str) -> tuple[str, str, Any]:
    """What it prints, what it says about errors, and its exit code."""
    os.chdir(folder)
    sys.argv = ["lightning-tex"]
    warnings.filterwarnings("ignore", "You defined a `validation_step`")
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    own = ("--trainer.devices", os.environ["WORLD_SIZE"], "--trainer.strategy.init_args.tensor_parallel_size", "1")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(["bench", "step", "--config", str(recipe), "--steps", "2", "--warmup", "1", "--json", *own, *options])
        except SystemExit as ended:
            code = ended.code
    assert not {"enter", "wait", "leave"} & set(vars(TRAINING)), "the flight record is its own again"
    return out.getvalue(), err.getvalue(), code


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the clock shows, one after another: time is what the test says."""
    shown = [0.0]
    monkeypatch.setattr(moments.time, "perf_counter", lambda: shown[-1])
    return shown


def test_time_belongs_to_the_part_that_was_entered_last(clock: list[float]) -> None:
    timeline = PartTimeline(torch.device("cpu"))
    timeline.enter("MoE")  # nothing is timed yet
    assert not timeline.active

    def later(seconds: float) -> None:
        clock.append(clock[-1] + seconds)

    timeline.phase(Part("rest", "forward"))
    later(1)
    with timeline.of_collectives():
        timeline.enter("MoE")
        later(2)
        TRAINING.enter("all_to_all", EVERY_RANK)
        later(4)
        TRAINING.leave()
        later(8)
        timeline.leave("MoE")
    timeline.leave("MoE")  # not there: nothing happens
    later(16)
    timeline.phase(Part("rest", "backward"))
    timeline.enter("MoE")
    timeline.enter("attention", "recompute")  # never left
    later(32)
    timeline.leave("MoE")
    later(64)
    timeline.stop()
    later(128)
    assert timeline.read() == {
        Part("rest", "forward"): 17,
        Part("MoE", "forward"): 10,
        Part(COMMUNICATION, "forward"): 4,
        Part("MoE", "backward"): 0,
        Part("attention", "recompute"): 32,
        Part("rest", "backward"): 64,
    }
    assert timeline.read() == {}


def one_process(folder: Path, recipe: Path) -> dict[str, Any]:
    mode = ("--trainer.strategy.init_args.activation_checkpointing", "communication_aware")
    again, _, code = bench(folder, recipe, "--trainer.strategy.init_args.expert_parallel_size", "1", *mode)
    assert code == 0
    for name in ("attention", "MoE", "head and loss", "optimizer", "MFU", "tokens/s"):
        assert name in again
    return json.loads(again.strip().splitlines()[-1])


def test_parts_of_a_step_in_one_process(recipe: Path, tmp_path: Path) -> None:
    (report,) = run_ranks(1, one_process, tmp_path, recipe)
    s, rows = SIZES, report["parts"]
    assert list(rows) == ["attention", "MLP", "MoE", "head and loss", "rest", "optimizer", COMMUNICATION, "between"]
    assert report["tokens"] == s["length"] * s["sequences"] and report["peak"]["of"] == "a product of this run"
    # Three forwards of two operations for each multiplication: projections, scores and mix; three matrices; logits.
    d = s["dim"]
    of_a_token = {
        "attention": s["layers"] * (4 * d * d + 2 * s["length"] * d),
        "MLP": 3 * 4 * d * d,
        "MoE": 3 * 4 * d * d + d * s["experts"],
        "head and loss": d * s["vocabulary"],
    }
    for name, multiplications in of_a_token.items():
        row = rows[name]
        assert row["flops"] == 6 * report["tokens"] * multiplications
        assert row["flops_per_second"] == pytest.approx(row["flops"] / row["total_ms"] * 1e3)
        assert row["mfu"] == pytest.approx(row["flops_per_second"] / report["peak"]["flops_per_second"])
        passes = {"forward", "backward"} if name == "head and loss" else {"forward", "recompute", "backward"}
        assert set(row["ms"]) == passes and min(row["ms"].values()) > 0, name
    assert report["flops_per_second"] == pytest.approx(
        sum(row["flops"] for row in rows.values()) / report["step_ms"] * 1e3
    )
    assert sum(row["total_ms"] for row in rows.values()) == pytest.approx(report["step_ms_by_part"])
    assert len(report["step_ms_all"]) == report["steps"] == 2
    assert report["tokens_per_second"] == pytest.approx(report["tokens"] / report["step_ms"] * 1e3)


def test_communication_on_two_ranks_is_a_part_of_its_own(recipe: Path, tmp_path: Path) -> None:
    (printed, _, code), other = run_ranks(2, bench, tmp_path, recipe, "--trainer.accumulate_grad_batches", "2")
    assert code == 0 and other == ("", "", 0)
    report = json.loads(printed.strip().splitlines()[-1])
    assert report["tokens"] == 2 * SIZES["length"] * SIZES["sequences"]
    assert {"forward", "backward", "between"} <= set(report["parts"][COMMUNICATION]["ms"])
    assert report["tokens_per_second_of_a_device"] == pytest.approx(report["tokens_per_second"] / 2)


def test_hooks_leave_a_module_as_it_was() -> None:
    from contextlib import ExitStack

    from lightning_tex.bench.step_parts import _hook

    linear = nn.Linear(2, 2)
    with ExitStack() as undo:
        timeline = PartTimeline(torch.device("cpu"))
        _hook(undo, timeline, "attention", linear)
        timeline.phase(Part("rest", "forward"))
        linear(torch.ones(1, 2, requires_grad=True)).sum().backward()
        assert Part("attention", "backward") in timeline.read()
    assert not linear._forward_hooks and not linear._backward_hooks and not linear._forward_pre_hooks
