"""``lightning-tex bench``: a recipe under every combination of communication options."""

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
from helpers import tiny_recipe

from lightning_tex.bench.combinations import COMBINATIONS
from lightning_tex.cli import main
from lightning_tex.testing.ranks import run_ranks


def bench(folder: Path, recipe: Path, *options: str) -> tuple[str, str, Any]:
    """What it prints, what it says about errors, and its exit code."""
    os.chdir(folder)
    sys.argv = ["lightning-tex"]
    sys.path.insert(0, str(Path(tiny_recipe.__file__).parent))
    warnings.filterwarnings("ignore", "You defined a `validation_step`")
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(["bench", "communication", "--config", str(recipe), *options])
        except SystemExit as ended:
            code = ended.code
    return out.getvalue(), err.getvalue(), code


def report(printed: str) -> dict[str, Any]:
    return json.loads(printed.strip().splitlines()[-1])


EVERY = [name.strip() for name in COMBINATIONS]
FEW = ["baseline", "+DTD", "and folding"]


@pytest.mark.parametrize("names", [FEW, pytest.param(EVERY, marks=pytest.mark.full)], ids=["few", "every"])
def test_combinations_give_the_same_loss_and_their_own_bytes(recipe: Path, tmp_path: Path, names: list[str]) -> None:
    quick = ("--steps", "1", "--warmup", "1", "--turns", "1", "--json")
    more = ("--model.init_args.config.num_experts", "4", "--model.init_args.config.num_layers", "2")
    only = () if names is EVERY else ("--only", *names)
    first, *others = run_ranks(4, bench, tmp_path, recipe, *quick, *more, *only)
    assert all(printed == "" and code == 0 for printed, _, code in others)
    found = report(first[0])
    rows = found["combinations"]
    assert list(rows) == names and not found["skipped"]
    assert all(name in first[0] for name in rows), "the table lists them"
    base = rows["baseline"]
    assert base["loss"] > 4
    for name, row in rows.items():
        assert row["loss"] == pytest.approx(base["loss"], rel=1e-5), name
        assert len(row["step_ms_all"]) == 1 and row["step_ms"] > 0 and row["cpu_ms_per_step_all_ranks"] > 0
        assert row["speedup"] == pytest.approx(base["step_ms"] / row["step_ms"])
        assert sum(row["sent_bytes_by_axis"].values()) == pytest.approx(sum(row["sent_bytes"].values()))
        replayed = name not in ("baseline", "+DTD")
        assert any(kind.endswith("/recompute") for kind in row["sent_bytes"]) != replayed
        assert len(row["stash_bytes_by_block"]) == 2, "one entry a block"
        assert all((count > 0) == replayed for count in row["stash_bytes_by_block"].values())
    expert = {name: row["sent_bytes"]["all_to_all/expert/backward"] for name, row in rows.items()}
    assert expert["+DTD"] < 0.6 * expert["baseline"]
    assert any("expert_tensor 1" in layout for layout in found["layouts"]), "folding has a layout of its own"


def test_a_combination_that_the_recipe_does_not_allow_is_skipped_with_the_reason(recipe: Path, tmp_path: Path) -> None:
    quick = ("--steps", "1", "--warmup", "1", "--turns", "1", "--json", "--only", "and folding")
    odd = ("--model.init_args.config.num_experts", "2", "--model.init_args.config.capacity_factor", "1.0")
    (printed, _, _), *_ = run_ranks(4, bench, tmp_path, recipe, *quick, *odd)
    found = report(printed)
    assert list(found["combinations"]) == ["baseline"]
    assert "num_experts=2" in found["skipped"]["and folding"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--only", "faster"), ("faster", "legal", "baseline", "and overlap")),
        (("--turns", "0"), ("--turns", "at least 1")),
    ],
    ids=["name", "turns"],
)
def test_wrong_options(recipe: Path, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    ((_, said, code),) = run_ranks(1, bench, tmp_path, recipe, *options)
    assert code == 2 and all(word in said for word in words), said
