"""``ckpt_path`` and ``init_from`` on the command line and in a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers import tiny_recipe

from lightning_tex import cli
from lightning_tex.recipe import Recipe
from lightning_tex.testing.ranks import run_ranks

PROBE = "--trainer.callbacks+=tiny_recipe.Probe"


@pytest.fixture
def restarting(recipe: Path) -> Path:
    """The recipe with ``ckpt_path: auto``."""
    content = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**content, "ckpt_path": "auto"}, sort_keys=False))
    return recipe


def test_one_command_begins_and_goes_on(restarting: Path, tmp_path: Path) -> None:
    words = [PROBE, *tiny_recipe.ON_ONE]
    run = tmp_path / "run"
    for limit, first in (("2", 0), ("4", 2)):
        run_ranks(1, tiny_recipe.fit, run, restarting, *words, "--trainer.max_steps", limit)
        found = tiny_recipe.probed(run)
        assert (found["first_step"], found["last_step"]) == (first, int(limit))
    weights = str(run / "checkpoints" / "last.ckpt")
    begin = ["--trainer.strategy.init_args.init_from", weights, "--trainer.max_steps", "1"]
    run_ranks(1, tiny_recipe.fit, tmp_path / "new", restarting, *words, *begin)
    found = tiny_recipe.probed(tmp_path / "new")
    assert (found["first_step"], found["last_step"]) == (0, 1)
    run_ranks(1, tiny_recipe.fit, tmp_path / "untrained", restarting, *words, "--trainer.max_steps", "1")
    assert found["last_loss"] < tiny_recipe.probed(tmp_path / "untrained")["last_loss"]  # on the same batch


def test_what_only_a_fit_needs_is_no_hindrance_to_plans(restarting: Path) -> None:
    recipe = Recipe(str(restarting), ["--trainer.strategy.init_args.init_from", "weights.ckpt"])
    assert "ckpt_path" not in recipe.config
    assert recipe.strategy_options()["tensor_parallel_size"] == 2
    assert "init_from" not in recipe.strategy_options()


def test_auto_is_refused_where_the_strategy_does_not_know_it(
    restarting: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", "--config", str(restarting), "--trainer.strategy", "auto", "--trainer.devices", "1"])
    assert end.value.code == 2
    assert "error: ckpt_path='auto' needs TexMoEStrategy" in capsys.readouterr().err
