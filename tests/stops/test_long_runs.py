"""After many steps with validation, saves and logging a run holds no more than after a few."""

from __future__ import annotations

from pathlib import Path

import long_run
import pytest


@pytest.mark.parametrize(
    ("steps", "every", "workers"), [(60, 15, 0), pytest.param(300, 20, 1, marks=pytest.mark.faults)]
)
def test_counts_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, every: int, workers: int) -> None:
    monkeypatch.setenv("LIGHTNING_TEX_CACHE", str(tmp_path / "cache"))
    for rows in long_run.measured(steps, every, workers, 2, str(tmp_path / "run"), 120):
        assert [row["step"] for row in rows] == list(range(every, steps + 1, every))
        filled, last = rows[2], rows[-1]  # two checkpoints and the newest one's name are kept
        assert {name: last[name] for name in long_run.COUNTS} == {name: filled[name] for name in long_run.COUNTS}
        assert last["files"] >= 3 and last["processes"] == 2 * workers


def rows(**growth: float) -> list[dict[str, float]]:
    """Twenty rows, in which some columns grow by so much a row."""
    columns = ("rss_mib", *long_run.COUNTS)
    return [{"step": 100 * i, **{name: 50 + i * growth.get(name, 0) for name in columns}} for i in range(20)]


@pytest.mark.parametrize("column", ["rss_mib", "descriptors", "threads", "processes", "shm", "files"])
def test_what_grows_is_not_flat(column: str) -> None:
    assert long_run.verdict(rows()).startswith("flat from step 400 on: memory 50.0 -> 50.0 MiB, ")
    assert long_run.verdict(rows(**{column: 1.0})).startswith("NOT FLAT")
