"""The bench of routers: its table of the runs that there are, and the page's, which is that of docs/routers.json."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import routers

SIZES = routers.Sizes()
LOADS = {"variation": 0.25, "dead": 0.125, "overflow": 0.1}
PAGE = Path(__file__).parents[2] / "docs" / "routing.md"


def runs(folder: Path, losses: dict[str, float]) -> routers.Runs:
    file = folder / "runs.json"
    of_keys = {key: {"loss": loss, **LOADS} for key, loss in losses.items()}
    file.write_text(json.dumps({"sizes": asdict(SIZES), "runs": of_keys}))
    return routers.Runs(SIZES, file)


def tried(*losses: float) -> dict[str, float]:
    """The dense model's by rate, of the seed that chooses."""
    return {f"dense/{rate:g}/0": loss for rate, loss in zip(routers.RATES, losses, strict=True)}


def of_row(name: str, rate: float, *losses: float) -> dict[str, float]:
    return {f"{name}/{rate:g}/{seed}": loss for seed, loss in zip(routers.SEEDS, losses, strict=False)}


def test_the_table_has_means_beside_the_dense_models_of_the_same_seeds(tmp_path: Path) -> None:
    best = routers.RATES[1]
    found = {
        **tried(5.0, 4.0, 4.5),
        **of_row("dense", best, 5.0, 5.2, 5.1),
        **of_row("softmax", best, 4.9, 5.2, 4.9),
        **of_row("switch", routers.RATES[0], 4.9, 5.2, 4.9),
        **of_row("hash", best, 4.9, 5.2),
    }
    assert routers.table(runs(tmp_path, found)).splitlines()[2:] == [
        "| dense | - | 5.100 +- 0.100 | - | - | - | - |",
        "| softmax | 8, 1 | 5.000 +- 0.173 | -0.100 +- 0.100 | 0.25 | 12.5% | 10.0% |",
    ]


def test_only_what_lacks_is_run_at_the_dense_models_best_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[float, int]] = []

    def run(contestant: Any, rate: float, seed: int, sizes: Any) -> dict[str, float]:
        made.append((rate, seed))
        return {"loss": 1.0 - rate, **LOADS}

    monkeypatch.setattr(routers, "run", run)
    some = runs(tmp_path, {f"dense/{routers.RATES[0]:g}/0": 1.5, f"softmax/{routers.RATES[-1]:g}/2": 1.0})
    for one in some.lacking("softmax"):
        some.make(*one)
    best = routers.RATES[-1]
    assert made == [*((rate, 0) for rate in routers.RATES[1:]), *((best, seed) for seed in routers.SEEDS if seed != 2)]
    again = routers.Runs(SIZES, some.file)
    assert again.found == some.found and not list(again.lacking("softmax"))


def test_runs_of_other_sizes_are_not_mixed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has runs of"):
        routers.Runs(routers.Sizes(steps=7), runs(tmp_path, {}).file)


def test_the_pages_table_is_what_the_command_prints() -> None:
    found = routers.Runs(SIZES, routers.RESULTS)
    assert all(len(found.of(name)) == len(routers.SEEDS) for name in routers.CONTESTANTS)
    text, page = routers.text_of(found), PAGE.read_text()
    assert text in page and routers.written(page, text) == page


def test_an_unknown_router_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        routers.main(["roulette"])
    assert "roulette; legal: dense, softmax" in capsys.readouterr().err
