"""A rank that raises, dies or stands still ends all of them in seconds: its error first and once, then who follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.stopped_runs import fit
from helpers.stops import POINTS, Ending, run_to_its_end

from lightning_tex.saving import latest

TOLD = {
    "raise": "failed first: ValueError: what this rank cannot do",
    "MemoryError": "failed first: OutOfMemory: out of memory on rank",
    "exit": "ended with exit code 3",
    "SIGKILL": "was killed by SIGKILL",
}

# Points at which the step before has begun a checkpoint.
AFTER_A_SAVE = ("forward", "backward", "optimizer")

# The last line of the traceback, or what it begins with.
ERRORS = {
    "raise": "ValueError: what this rank cannot do",
    "MemoryError": "lightning_tex.strategy.out_of_memory.OutOfMemory: out of memory on rank",
}


def stopped(
    folder: Path, deed: str, rank: int, point: str = "forward", launcher: str = "own", timeout: float = 60.0
) -> Ending:
    incident = {"deed": deed, "rank": rank, "point": point, "saved": deed in TOLD and point in AFTER_A_SAVE}
    ending = run_to_its_end(4, lambda: fit(incident, timeout), folder=folder, launcher=launcher, within=40)
    assert not ending.left, ending.text
    assert len(ending.codes) == 4 and 0 not in ending.codes.values(), ending
    return ending


def followers(ending: Ending) -> list[str]:
    """Of lines such as ``[rank 2] ended: ..``."""
    return sorted(line for line in ending.lines if "] ended: " in line)


def assert_followed(ending: Ending, rank: int, *told: str) -> None:
    """All but one rank say once whom they followed, and nothing else."""
    lines = followers(ending)
    assert [line[:8] for line in lines] == [f"[rank {other}]" for other in range(4) if other != rank], ending.text
    for line in lines:
        assert f"ended: rank {rank} (" in line and any(text in line for text in told), line


def assert_error_first(ending: Ending, rank: int, error: str) -> None:
    """The rank's traceback, under its heading, before the others' lines, once."""
    assert ending.lines[0].startswith(f"[rank {rank}] failed ("), ending.text
    assert ending.lines[0].endswith(", step 2):")
    assert ending.text.count("Traceback") == ending.text.count(f"\n{error}") == 1, ending.text
    assert ending.line_of(error) < min(ending.line_of(line) for line in followers(ending))


def check_death(folder: Path, deed: str, rank: int, point: str, launcher: str) -> None:
    ending = stopped(folder, deed, rank, point, launcher)
    assert ending.took_less_than(5), ending
    known = deed in ("raise", "MemoryError") or (launcher == "own" and rank != 0)
    # Of a process of another parent it is known if that has not asked yet.
    assert_followed(ending, rank, TOLD[deed], *([] if known else ["died"]))
    if deed in ("raise", "MemoryError"):
        assert_error_first(ending, rank, ERRORS[deed])
    else:
        assert "Traceback" not in ending.text
    # The only one may be on its way when a process dies, or when a rank raises in a save.
    sure = point in AFTER_A_SAVE or (point == "validation" and deed in ERRORS)
    newest = latest(folder / "checkpoints")
    assert newest is not None or not sure
    if sure or deed not in ERRORS:
        there = newest is not None
        assert ending.text.count("checkpoints/step=2.ckpt, step 2; ckpt_path='last'") == there, ending.text


@pytest.mark.parametrize(
    ("deed", "rank", "point", "launcher"),
    [("raise", 1, "backward", "own"), ("raise", 0, "save", "external"), ("SIGKILL", 2, "forward", "own")],
)
def test_all_follow_the_rank_that_failed(tmp_path: Path, deed: str, rank: int, point: str, launcher: str) -> None:
    check_death(tmp_path, deed, rank, point, launcher)


@pytest.mark.faults
@pytest.mark.parametrize("launcher", ["own", "external"])
@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("deed", TOLD)
def test_all_follow_any_rank_that_fails_anywhere(
    tmp_path: Path, deed: str, rank: int, point: str, launcher: str
) -> None:
    check_death(tmp_path, deed, rank, point, launcher)


@pytest.mark.faults
@pytest.mark.parametrize("launcher", ["own", "external"])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("deed", ["raise", "SIGKILL"])
def test_a_rank_that_fails_when_others_are_through_is_followed(
    tmp_path: Path, deed: str, rank: int, launcher: str
) -> None:
    ending = stopped(tmp_path, deed, rank, "end", launcher)
    assert ending.took_less_than(5), ending
    assert_followed(ending, rank, TOLD[deed], "died")
    assert ending.text.count("Traceback") == (deed == "raise")


def check_stall(folder: Path, deed: str, rank: int, point: str, launcher: str, told: str) -> None:
    ending = stopped(folder, deed, rank, point, launcher, timeout=4.0)
    assert ending.took.seconds > 3.5 and ending.took_less_than(4 + 5), ending
    assert any(f"rank {rank} (" in line and told in line for line in followers(ending)), ending.text
    assert "Traceback" not in ending.text


def check_skipped(folder: Path, rank: int, point: str, launcher: str) -> None:
    """What the others call meanwhile is of another size: gloo may end a process by itself."""
    ending = stopped(folder, "skip", rank, point, launcher, timeout=4.0)
    assert ending.took_less_than(4 + 5), ending
    lines = followers(ending)
    assert lines, ending.text
    named = any(f"rank {rank} (" in line and " others are in #" in line for line in ending.lines)
    assert named or "ended: rank 0 (" in lines[0], ending.text


STALLS: dict[str, Any] = {
    "SIGSTOP": "does not answer: its process is stopped by a signal",
    "busy": "is in no collective for ",
}


def test_a_stopped_rank_is_named_and_ended(tmp_path: Path) -> None:
    check_stall(tmp_path, "SIGSTOP", 2, "forward", "own", STALLS["SIGSTOP"])


@pytest.mark.faults
@pytest.mark.parametrize("launcher", ["own", "external"])
@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("point", ["forward", "optimizer", "validation"])
@pytest.mark.parametrize("deed", STALLS)
def test_any_rank_that_stands_still_is_named(tmp_path: Path, deed: str, rank: int, point: str, launcher: str) -> None:
    check_stall(tmp_path, deed, rank, point, launcher, STALLS[deed])


@pytest.mark.faults
@pytest.mark.parametrize("launcher", ["own", "external"])
@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("point", ["forward", "optimizer", "validation"])
def test_a_collective_left_out_is_named(tmp_path: Path, rank: int, point: str, launcher: str) -> None:
    check_skipped(tmp_path, rank, point, launcher)


@pytest.mark.faults
@pytest.mark.parametrize("rank", range(4))
def test_shapes_that_differ_are_named(tmp_path: Path, rank: int) -> None:
    ending = stopped(tmp_path, "shape", rank, timeout=4.0)
    assert ending.took_less_than(4 + 5)
    assert "all_gather over world of float32 [4000]" in ending.text
