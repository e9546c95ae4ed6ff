"""``ckpt_path`` and ``init_from`` on the command line and in a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import tiny_recipe
from helpers.ranks import together

from lightning_tex import cli
from lightning_tex.recipe import Recipe

PROBE = "--trainer.callbacks+=tiny_recipe.Probe"


@pytest.fixture
def restarting(recipe: Path) -> Path:
    """The recipe with ``ckpt_path: auto``."""
    content = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**content, "ckpt_path": "auto"}, sort_keys=False))
    return recipe


def test_one_command_begins_and_goes_on(restarting: Path, tmp_path: Path) -> None:
    words = [PROBE, *tiny_recipe.ON_ONE]
    begin = ("--trainer.strategy.init_args.init_from", str(tmp_path / "run" / "checkpoints" / "last.ckpt"))
    fits = {
        "begins": ("run", *words, "--trainer.max_steps", "2"),
        "goes on": ("run", *words, "--trainer.max_steps", "4"),
        "of its weights": ("new", *words, *begin, "--trainer.max_steps", "1"),
        "untrained": ("untrained", *words, "--trainer.max_steps", "1"),
    }
    runs = {name: (fit, restarting, tmp_path, *options) for name, options in fits.items()}
    found = {name: probed for name, (probed,) in together(1, runs).items()}
    steps = {name: (probed["first_step"], probed["last_step"]) for name, probed in found.items()}
    assert steps == {"begins": (0, 2), "goes on": (2, 4), "of its weights": (0, 1), "untrained": (0, 1)}
    assert found["of its weights"]["last_loss"] < found["untrained"]["last_loss"]  # on the same batch


def fit(recipe: Path, folder: Path, name: str, *words: str) -> dict[str, Any]:
    tiny_recipe.fit(folder / name, recipe, *words)
    return tiny_recipe.probed(folder / name)


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
