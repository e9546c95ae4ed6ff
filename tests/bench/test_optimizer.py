"""``lightning-tex bench optimizer``: memory, bytes and what is told; no time is held to anything."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_tex.bench.candidates import Candidate, Flat, Workload, ours, torchs
from lightning_tex.bench.memory import live_bytes
from lightning_tex.bench.optimizer import stepped
from lightning_tex.cli import main
from lightning_tex.cli.bench import OPTIMIZER, bench_optimizer
from lightning_tex.parallel.topology import Topology
from lightning_tex.testing.ranks import run_ranks

ELEMENTS = 1 << 18


def bench(*options: str) -> tuple[str, str, Any]:
    """What it prints, what it says about errors, and its exit code."""
    sys.argv = ["lightning-tex"]
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(["bench", "optimizer", *options])
        except SystemExit as ended:
            code = ended.code
    return out.getvalue(), err.getvalue(), code


def cases(ranks: int, *options: str) -> list[dict[str, Any]]:
    """What rank 0 reports; the others are silent."""
    (printed, said, code), *others = run_ranks(ranks, bench, "--turns", "2", "--json", *options)
    assert code == 0 and all(other[::2] == ("", 0) for other in others), (said, others)
    return json.loads(printed.strip().splitlines()[-1])["cases"]


@pytest.mark.parametrize("sizes", [("--elements", "1e5", "8e5"), ("--experts", "4", "32", "--width", "32")])
def test_temporaries_of_the_tiled_step_stay_and_the_untiled_steps_grow(sizes: tuple[str, ...]) -> None:
    small, large = cases(1, *sizes, "--dtype", "bfloat16", "--tile_size", "8192")
    growth = large["elements"] / small["elements"]
    assert growth > 7

    def temporary(case: dict[str, Any], name: str) -> int:
        return case["candidates"][name]["peak_temporary_bytes"]

    assert temporary(large, "tiled") == temporary(small, "tiled") > 0
    assert temporary(large, "tiled") < 16 * 8192
    for name in ("untiled", "torch fused", "torch foreach", "torch loop"):
        assert temporary(large, name) == pytest.approx(growth * temporary(small, name), rel=0.15), name
        assert temporary(large, name) > 3.5 * large["elements"]


def test_bytes_of_state_and_of_a_step_are_those_of_the_tensors() -> None:
    single, half = cases(1, "--elements", "131072")
    assert (single["dtype"], half["dtype"]) == ("float32", "bfloat16")
    # parameter + gradient + moments: 4 + 4 + 8; in bf16 2 + 2 + fp32 master 4 + 8, or without master 2 + 2 + 4
    for case, odd in ((single, {}), (half, {"torch fused, no master": 8})):
        for name, row in case["candidates"].items():
            expected = odd.get(name, 16)
            assert row["state_bytes_per_parameter"] == pytest.approx(expected, rel=1e-3), name
            assert row["moved_bytes"] / case["elements"] == pytest.approx(14 if name in odd else 28, rel=1e-3), name
            assert row["gb_per_s"] == pytest.approx(row["moved_bytes"] / row["step_ms"] / 1e6)
    (momentum,) = cases(1, "--elements", "131072", "--optimizer", "SGD", "--dtype", "float32")
    assert momentum["candidates"]["tiled"]["state_bytes_per_parameter"] == pytest.approx(12, rel=1e-3)


def test_states_are_sharded_over_ranks() -> None:
    sizes = ("--dtype", "float32", "--experts", "4", "--width", "32")
    (alone,), (shared,) = cases(1, *sizes), cases(4, *sizes, "--expert_parallel_size", "2")
    assert shared["elements"] < 0.6 * alone["elements"], "experts are spread over two ranks"
    experts_over_2, rest_over_4 = 16 / 20 / 2, 4 / 20 / 4
    sharded = pytest.approx(4 + 4 + 8 * (experts_over_2 + rest_over_4), rel=0.01)
    for name, row in shared["candidates"].items():
        whole = pytest.approx(16, rel=1e-3)
        assert row["state_bytes_per_parameter"] == (whole if name.startswith("torch") else sharded), name
        assert row["moved_bytes"] is None


def test_every_case_says_what_was_timed_and_what_was_skipped(tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    single, _ = cases(
        1, "--elements", "1e5", "--experts", "4", "--width", "16", "--dtype", "float32", "--plot", f"{plot}"
    )
    assert plot.stat().st_size > 10_000
    rows = single["candidates"]
    ours = ["tiled", "tiled, checked", "tiled, checked, clipped", "untiled"]
    torchs = ["torch fused", "torch foreach", "torch loop"]
    assert list(rows) == [*ours, *torchs] and not single["skipped"]
    assert single["copy_gb_per_s"] > 0 and rows["torch fused"]["ratio"] == rows["torch fused"]["cpu_ratio"] == 1
    for row in rows.values():
        low, high = row["step_ms_quartiles"]
        assert 0 < row["step_ms_min"] <= low <= row["step_ms"] <= high and len(row["step_ms_all"]) == 2
        assert row["ratio"] > 0 and row["cpu_ms"] > 0
    assert rows["tiled"]["tile_size"] == 100_032, "no temporaries: one tile, whose length is a multiple of 64"


def left_alive() -> dict[str, int]:
    """Bytes that outlive each candidate."""
    cpu, left = torch.device("cpu"), {}
    workload = Workload(ELEMENTS, None, 1, torch.bfloat16, cpu, "AdamW", Topology.single())
    for name, build in (ours(None, ["fp32"]) | torchs(True)).items():
        before = live_bytes(cpu)
        stepped(build(workload)).close()
        left[name] = live_bytes(cpu) - before
    return left


def test_a_candidate_leaves_its_memory_to_the_next() -> None:
    (left,) = run_ranks(1, left_alive)
    assert len(left) == 9 and max(left.values()) < ELEMENTS, left


class Refused(Candidate):
    """A contestant that cannot be had."""

    def __init__(self, workload: Workload) -> None:
        raise ImportError("no module named refused")


class Named(Flat):
    """A contestant that can."""


def beside_contestants() -> dict[str, Any]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        words = ["--elements", "1e5", "--dtype", "float32", "--turns", "2", "--json"]
        contestants = {"another": Named, "missing": Refused}
        replace(OPTIMIZER, action=partial(bench_optimizer, contestants=contestants))(words)
    return json.loads(printed.getvalue().strip().splitlines()[-1])["cases"][0]


def test_contestants_are_measured_beside_ours_or_skipped_with_the_reason() -> None:
    (case,) = run_ranks(1, beside_contestants)
    assert list(case["candidates"])[-1] == "another" and case["candidates"]["another"]["step_ms"] > 0
    assert case["skipped"] == {"missing": "no module named refused"}


def test_what_does_not_fit_into_memory_is_skipped_with_the_numbers() -> None:
    (case,) = cases(1, "--elements", "1e6", "--dtype", "float32", "--memory_gib", "0.01")
    assert all("--memory_gib" in case["skipped"][name] for name in ("tiled", "torch fused"))
    (case,) = cases(1, "--elements", "1e6", "--dtype", "float32", "--memory_gib", "0.05")
    assert case["candidates"]["tiled"]["step_ms"] > 0
    assert case["candidates"]["torch loop"]["step_ms"] is None, "not beside the others"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--elements", "0.5"), ("--elements", "0.5", "whole number")),
        (("--turns", "many"), ("--turns", "many")),
        (("--faster",), ("unknown", "--faster")),
        (("--formats", "fp7"), ("--formats", "fp7", "fp32")),
        (("--tensor_parallel_size", "2"), ("tensor_parallel_size=2", "legal: 1")),
    ],
    ids=["elements", "turns", "unknown", "format", "layout"],
)
def test_wrong_options(options: tuple[str, ...], words: tuple[str, ...]) -> None:
    ((_, said, code),) = run_ranks(1, bench, *options)
    assert code == 2 and all(word in said for word in words), said
