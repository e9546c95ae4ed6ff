"""Ranks that fail before they have found each other, and the launchers that users have."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers.stopped_runs import fit
from helpers.stops import Ending, run_command, run_to_its_end

SCRIPT = ["-m", "helpers.stopped_runs"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]


def ended(folder: Path, deed: str, rank: int, point: str) -> Ending:
    incident = {"deed": deed, "rank": rank, "point": point}
    ending = run_to_its_end(4, lambda: fit(incident), folder=folder, within=40)
    assert not ending.left, ending.text
    assert len(ending.codes) == 4 and 0 not in ending.codes.values(), ending
    assert ending.took_less_than(5), ending
    return ending


@pytest.mark.parametrize(
    ("deed", "rank", "point", "told"),
    [
        ("exit", 2, "start", "[rank 0] ended: rank 2 ended with exit code 3"),
        pytest.param("raise", 2, "start", "[rank 0] ended: rank 2 ended with exit code 1", marks=pytest.mark.faults),
        pytest.param("SIGKILL", 1, "launch", "[rank 0] ended: rank 1 was killed by SIGKILL", marks=pytest.mark.faults),
        pytest.param("raise", 0, "launch", "ValueError: what this rank cannot do", marks=pytest.mark.faults),
        ("SIGKILL", 0, "launch", "[rank 3] ended: the process that had started it is gone"),
        pytest.param("SIGKILL", 3, "setup", "ended: rank 3 (", marks=pytest.mark.faults),
    ],
)
def test_ranks_that_fail_before_the_run_is_set_up(tmp_path: Path, deed: str, rank: int, point: str, told: str) -> None:
    ending = ended(tmp_path, deed, rank, point)
    assert told in ending.text
    assert ending.text.count("Traceback") == (deed == "raise")


@pytest.mark.faults
@pytest.mark.parametrize("launcher", [[], TORCHRUN], ids=["script", "torchrun"])
@pytest.mark.parametrize(("deed", "rank"), [("raise", 0), ("raise", 2), ("SIGKILL", 0), ("SIGKILL", 3), ("exit", 1)])
def test_launchers_of_users(tmp_path: Path, launcher: list[str], deed: str, rank: int) -> None:
    incident = json.dumps({"deed": deed, "rank": rank, "point": "forward"})
    ending = run_command([sys.executable, *launcher, *SCRIPT, incident], folder=tmp_path, within=20)
    assert not ending.left, ending.text
    assert ending.codes[0] != 0
    assert ending.took_less_than(8 if launcher else 5), ending  # torchrun reports at length
    assert ending.text.count("ValueError: what this rank cannot do") == (4 if deed == "raise" else 0), ending.text
    assert f"ended: rank {rank} (" in ending.text
