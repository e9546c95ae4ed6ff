"""Every recipe is valid, and the script among them trains the same on every layout."""

from __future__ import annotations

import csv
import importlib.util
import os
import sys
from pathlib import Path

import pytest

from lightning_tex import cli
from lightning_tex.recipe import TexCLI
from lightning_tex.testing.ranks import run_ranks

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_recipe_builds_trainer_model_and_data(recipe, tmp_path):
    devices, vocabularies = run_ranks(1, _built, recipe, tmp_path)[0]
    assert devices > 1
    assert vocabularies[0] == vocabularies[1]


def test_own_text_takes_a_folder_from_the_command_line(tmp_path):
    run_ranks(1, _built, RECIPES / "own_text.yaml", tmp_path, "--data.path", "texts")


def test_own_module_trains_the_same_in_one_process_and_on_four(tmp_path):
    run_ranks(1, _own_module, "auto", tmp_path)
    run_ranks(4, _own_module, "tex_moe", tmp_path)
    alone, parallel = (_losses(tmp_path / name) for name in ("auto", "tex_moe"))
    assert len(alone) == 5
    assert parallel == pytest.approx(alone, rel=1e-5)


def _built(recipe: Path, folder: Path, *options: str) -> tuple[int, tuple[int, int]]:
    """Instantiate everything a recipe names, without running it."""
    os.chdir(folder)
    seen: list[TexCLI] = []
    TexCLI._run_subcommand = lambda self, subcommand: seen.append(self)
    cli.main(["fit", "--config", str(recipe), *options])
    built = seen[0]
    if options:
        assert built.datamodule._preparation.source.path == options[1]
    return built.trainer.num_devices, (built.model.config.vocab_size, built.datamodule.vocab_size)


def _own_module(strategy: str, folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("own_module", RECIPES / "own_module.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules["own_module"] = script
    spec.loader.exec_module(script)
    os.chdir(folder)
    script.main(strategy, max_steps=5, folder=str(folder))


def _losses(folder: Path) -> list[float]:
    with next(folder.rglob("metrics.csv")).open() as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file)]
