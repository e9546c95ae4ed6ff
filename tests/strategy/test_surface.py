"""Every use of Lightning that docs/lightning.md lists: it works as in one process without us, or is refused by name.

A sample of rows by default, all with ``pytest -m full``.
"""

from __future__ import annotations

import importlib.util
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers.cases import in_full, selected
from helpers.ranks import together
from helpers.surface import Row, Use, differences, outcome
from helpers.surface_rows import ROWS
from helpers.surface_uses import without_main_guard

ROOT = Path(__file__).parents[2]
RUN = {row.name: row for row in ROWS if row.use is not None}
DEFAULT = (
    "stages: fit, then test",
    "Trainer: overfit_batches",
    "Trainer: sync_batchnorm",
    "optimization: several optimizers, toggle_optimizer",
    "callbacks: ModelPruning, several processes",
    "callbacks: ModelCheckpoint(train_time_interval=)",
)


assert set(DEFAULT) <= RUN.keys(), "a row has another name now"


def missing(row: Row) -> list[str]:
    return [package for package in row.needs if importlib.util.find_spec(package) is None]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[Any]]:
    """By world, ours or not, and row: of every rank."""
    folder = str(tmp_path_factory.mktemp("surface"))
    rows = [row for row in RUN.values() if row.name in selected(request, "name") and not missing(row)]
    found = {}
    for world, ours in ((1, False), (1, True), (2, True)):
        asked = [row for row in rows if (world in row.worlds if ours else not row.refused)]
        runs = {row.name: (outcome, row, world, ours, folder) for row in asked}
        found |= {(world, ours, name): ranks for name, ranks in together(world, runs, timeout=500).items()}
    return found


@pytest.mark.parametrize("name", in_full(RUN, DEFAULT))
def test_a_row_of_the_surface(name: str, outcomes: dict[Any, list[Any]]) -> None:
    row = RUN[name]
    if missing(row):
        pytest.skip(f"not installed: {', '.join(missing(row))}")
    (expected,) = outcomes.get((1, False, name), [None])
    for world in row.worlds:
        for rank, (state, found) in enumerate(outcomes[world, True, name]):
            where = f"rank {rank} of {world}: {found}"
            if row.refused:
                assert state == "refused" and row.refused in found, where
            else:
                assert state == "works", where
                assert not row.alike or not list(differences(found, expected[1])), where


@pytest.mark.full
def test_a_script_without_a_main_guard(tmp_path: Path) -> None:
    facts = without_main_guard(Use(2, True, tmp_path))
    assert facts["lines"] == [f"rank {rank} of 2 took 4 steps" for rank in range(2)]


@cache
def text_of(path: str) -> str:
    return (ROOT / path).read_text()


@pytest.mark.parametrize("row", [row for row in ROWS if row.use is None], ids=lambda row: row.name)
def test_a_row_that_another_test_holds(row: Row) -> None:
    assert "def test_" in text_of(row.held_by)
    assert row.refused in text_of(row.held_by)


def test_the_documentation_has_the_table() -> None:
    page = (ROOT / "docs" / "lightning.md").read_text()
    assert runpy.run_path(str(ROOT / "docs" / "surface.py"))["rewritten"](page) == page
