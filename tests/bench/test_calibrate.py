"""``lightning-tex bench calibrate``: measures a profile that ``lightning-tex plan`` reads."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest

from lightning_tex.cli import main
from lightning_tex.planner.cluster import Cluster
from lightning_tex.testing.ranks import run_ranks


def calibrate(path: Path, on_node: int) -> None:
    """As under torchrun, with nodes of that many ranks."""
    warnings.simplefilter("ignore")
    os.environ["LOCAL_WORLD_SIZE"] = str(on_node)
    main(["bench", "calibrate", "--output", str(path), "--turns", "1", "--megabytes", "1", "--device", "cpu", "--json"])


@pytest.mark.parametrize("on_node", [2, 1])
def test_a_measured_profile_is_what_plan_reads(tmp_path: Path, on_node: int) -> None:
    path = tmp_path / "own.yaml"
    run_ranks(2, calibrate, path, on_node, detail=False)
    found = Cluster.named(str(path))
    assert found.gpus_per_node == on_node and found.device == "cpu"
    assert found.peak_flops_fp32 > 1e8 and found.memory_bandwidth > 1e8
    assert found.network_bandwidth > 1e5 and found.network_latency > 0
    assert (found.link_bandwidth == found.network_bandwidth) == (on_node == 2), "one node has no network of its own"


def test_own_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "own.yaml"
    words = ["--output", str(path), "--ranks", "2", "--turns", "1", "--megabytes", "1", "--device", "cpu", "--json"]
    main(["bench", "calibrate", *words])
    reported = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    assert Cluster(**reported) == Cluster.named(str(path)) and reported["gpus_per_node"] == 2


@pytest.mark.parametrize("words", [["--output", "own.json"], ["--output", "own.yaml", "--like", "tpu"]])
def test_what_is_wrong_is_said(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "calibrate", *words])
    assert ended.value.code == 2 and "legal" in capsys.readouterr().err
