"""``benchmarks/optimizer_step.py``: sharded optimizers of other projects beside ours."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any

import optimizer_step
import pytest
import torch

from lightning_tex.bench.candidates import Workload
from lightning_tex.bench.memory import live_bytes
from lightning_tex.bench.optimizer import stepped
from lightning_tex.parallel.topology import Topology
from lightning_tex.testing.ranks import run_ranks

ELEMENTS = 1 << 18
PEER = "ZeroRedundancyOptimizer"


def bench(*options: str) -> list[dict[str, Any]]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        optimizer_step.main(["--turns", "2", "--json", *options])
    return json.loads(printed.getvalue().strip().splitlines()[-1])["cases"]


def test_a_peers_bytes_are_counted_as_ours_are() -> None:
    single, half = run_ranks(1, bench, "--elements", "131072")[0]
    # parameter + gradient + moments: 4 + 4 + 8; in bf16, without a master, 2 + 2 + 4
    for case, expected in ((single, 16), (half, 8)):
        row = case["candidates"][PEER]
        assert row["state_bytes_per_parameter"] == pytest.approx(expected, rel=1e-3)
        assert row["moved_bytes"] / case["elements"] == pytest.approx(28 * expected / 16, rel=1e-3)
        assert row["gb_per_s"] == pytest.approx(row["moved_bytes"] / row["step_ms"] / 1e6)
        assert list(case["candidates"])[:4] == ["tiled", "tiled, checked", "tiled, checked, clipped", "untiled"]


def left_alive() -> int:
    """Bytes that outlive the peer."""
    cpu = torch.device("cpu")
    before = live_bytes(cpu)
    peer = optimizer_step.ZeroRedundancy
    stepped(peer(Workload(ELEMENTS, None, 1, torch.bfloat16, cpu, "AdamW", Topology.single()))).close()
    return live_bytes(cpu) - before


def test_a_peer_leaves_its_memory_to_the_next() -> None:
    assert run_ranks(1, left_alive)[0] < ELEMENTS


def test_a_peer_that_is_not_there_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    (case,) = run_ranks(1, bench, "--elements", "1e5", "--dtype", "float32")[0]
    assert "DeepSpeed ZeRO-1" not in case["candidates"]
    assert "deepspeed" in case["skipped"]["DeepSpeed ZeRO-1"]


def test_a_wrong_option_is_one_line() -> None:
    with pytest.raises(SystemExit) as ended:
        optimizer_step.main(["--faster", "1"])
    assert str(ended.value.code).startswith("error: unknown: --faster 1")
