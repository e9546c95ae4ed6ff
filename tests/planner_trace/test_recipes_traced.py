"""Every recipe at its own world size: cut, two steps taken, on text that is streamed from a local file."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import datasets  # noqa: F401  (once here, not in every forked rank)
import pytest
from helpers.cases import in_full

from lightning_tex.data.tokenizer import train_bpe
from lightning_tex.planner_trace import trace
from lightning_tex.recipe import Recipe
from lightning_tex.testing.ranks import run_ranks

WORLDS = {"quickstart": 4, "own_text": 4, "ted-40b-128xa100": 128, "mixtral-8x7b-64xh100": 64}
# Those whose models begin with random weights.
RECIPES = [path for path in sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")) if path.stem in WORLDS]
DEFAULT = [path for path in RECIPES if path.stem in ("quickstart", "mixtral-8x7b-64xh100")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    words = [f"{stem}{end}" for stem in ("rout", "gat", "cut", "shar") for end in ("e", "ing", "ed", "er", "s")]
    texts = [" ".join(words[(i * 7 + j * j) % len(words)] for j in range(900)) for i in range(240)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_bpe(texts[:2], 260).save(str(folder / "tokenizer.json"))
    return folder


def on_a_local_stream(recipe: Path, corpus: Path, options: list[str]) -> tuple[int, object]:
    warnings.simplefilter("ignore")
    data = {
        "path": "json",
        "name": "null",
        "data_files": str(corpus / "texts.jsonl"),
        "streaming": "true",
        "tokenizer": str(corpus),
        "num_workers": "0",
        "validation_split": "null",
    }
    words = [word for name, value in data.items() for word in (f"--data.{name}", value)]
    loaded = Recipe(str(recipe), [*words, *options])
    return loaded.world_size(), trace(loaded, loaded.world_size(), 1, own_data=True)


def small(recipe: Path) -> list[str]:
    """One micro-batch a step, of one sequence for each data rank, and the first blocks of a deep model."""
    if WORLDS[recipe.stem] == 4:
        return []
    return [
        "--trainer.accumulate_grad_batches",
        "1",
        "--data.global_batch_size",
        "32",
        "--model.config.num_layers",
        "2",
    ]


@pytest.mark.parametrize("recipe", in_full(RECIPES, DEFAULT), ids=lambda path: path.stem)
def test_a_recipe_is_cut_and_takes_steps(recipe, corpus):
    world, found = run_ranks(1, on_a_local_stream, recipe, corpus, small(recipe))[0]
    assert world == found.layout.world == WORLDS[recipe.stem]
    assert found.rank == 1 and found.flops["backward"] > 0 and found.flops["forward"] > 0
    assert any(kind.during == "optimizer" for kind in found.sent_bytes)


# What a GPU of the machine that a recipe names has, GB, and what a rank keeps between steps by 4 P + 12 N / G.
LARGE = {"ted-40b-128xa100": (40, 38.87e9, 10.3), "mixtral-8x7b-64xh100": (80, 46.70e9, 34.5)}


@pytest.mark.full
@pytest.mark.parametrize("name", LARGE)
def test_a_large_recipe_fits_the_machine_it_is_named_for(name):
    recipe = next(path for path in RECIPES if path.stem == name)
    gigabytes, parameters, kept = LARGE[name]
    found = run_ranks(1, whole, recipe, timeout=900)[0]
    assert found.parameters == pytest.approx(parameters, rel=1e-3)
    assert sum(found.state_bytes.values()) / 1e9 == pytest.approx(kept, rel=0.02)
    assert found.peak_bytes < 0.9 * gigabytes * 1e9


def whole(recipe: Path):
    warnings.simplefilter("ignore")
    loaded = Recipe(str(recipe))
    return trace(loaded, loaded.world_size(), trainer={"accumulate_grad_batches": 1})
