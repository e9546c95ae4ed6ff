"""Every recipe is valid, and the script among them trains the same on every layout."""

from __future__ import annotations

import csv
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_recipe
from helpers.chats import chat, write_lines
from helpers.published_folders import loaded, publish, tensors

from lightning_tex import cli
from lightning_tex.data.tokenizer import train_bpe
from lightning_tex.recipe import TexCLI
from lightning_tex.testing.ranks import run_ranks

RECIPES = Path(__file__).parents[2] / "recipes"
PUBLISHED = ("finetune.yaml", "finetune_lora.yaml", "sft.yaml")


def _is_here(recipe: Path) -> bool:
    """Whether it needs nothing from elsewhere; test_published_recipes.py has the others."""
    text = recipe.read_text()
    return "pretrained:" not in text or "pretrained: runs/published" in text


@pytest.mark.parametrize("recipe", [*filter(_is_here, sorted(RECIPES.glob("*.yaml")))], ids=lambda path: path.name)
def test_recipe_builds_trainer_model_and_data(recipe, tmp_path):
    devices, vocabularies = run_ranks(1, _built, recipe, tmp_path)[0]
    assert devices > 1
    # A published model has its own, in which the tokenizer's fits.
    assert vocabularies[0] == vocabularies[1] or (recipe.name in PUBLISHED and vocabularies[0] > vocabularies[1])


def test_own_text_takes_a_folder_from_the_command_line(tmp_path):
    run_ranks(1, _built, RECIPES / "own_text.yaml", tmp_path, "--data.path", "texts")


def _folders(folder: Path, *options: str) -> dict[str, str]:
    os.chdir(folder)
    (folder / "beside").mkdir()
    (folder / "beside" / "made_by_hand.py").write_text(
        "import lightning_tex\nclass Words(lightning_tex.TextDataModule): pass\n"
    )
    recipe = (RECIPES / "quickstart.yaml").read_text()
    (folder / "beside" / "recipe.yaml").write_text(recipe.replace("lightning_tex.TextDataModule", "made_by_hand.Words"))
    seen: list[TexCLI] = []
    TexCLI._run_subcommand = lambda self, subcommand: seen.append(self)
    cli.main(["fit", "--config", "beside/recipe.yaml", *options])
    trainer = seen[0].trainer
    return {
        "data": type(seen[0].datamodule).__name__,
        "logs": os.path.relpath(trainer.logger.save_dir),
        "root": os.path.relpath(trainer.default_root_dir),
        "checkpoints": os.path.relpath(trainer.checkpoint_callback.dirpath),
    }


@pytest.mark.parametrize(
    ("options", "root", "checkpoints"),
    [
        ([], "runs/quickstart", "runs/quickstart/checkpoints"),
        (["--run_dir", "there"], "there", "there/checkpoints"),
        (["--trainer.default_root_dir", "logs"], "logs", "runs/quickstart/checkpoints"),
    ],
)
def test_the_folders_of_a_run_and_a_data_module_beside_its_recipe(options, root, checkpoints, tmp_path):
    found = run_ranks(1, _folders, tmp_path, *options)[0]
    assert found == {"data": "Words", "logs": root, "root": root, "checkpoints": checkpoints}


def test_own_module_trains_the_same_in_one_process_and_on_four(tmp_path):
    run_ranks(1, _own_module, "auto", tmp_path)
    run_ranks(4, _own_module, "tex_moe", tmp_path)
    alone, parallel = (_losses(tmp_path / name) for name in ("auto", "tex_moe"))
    assert len(alone) == 5
    assert parallel == pytest.approx(alone, rel=1e-5)


@pytest.mark.full  # by default a recipe of test_published_recipes.py goes the same way
@pytest.mark.parametrize("name", ["finetune.yaml", "finetune_lora.yaml"])
def test_a_published_model_is_fine_tuned_and_exported_to_a_folder_that_transformers_loads(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    place, text = published_at(tmp_path), tmp_path / "text"
    text.mkdir()
    for number in range(12):
        (text / f"{number}.txt").write_text(f"document {number} of some words and some others, " * 40)
    short = ["--data.path", str(text), "--data.sequence_length", "16", "--data.global_batch_size", "4"]
    short += ["--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1", "--trainer.logger", "false"]
    run_ranks(4, tiny_recipe.fit, tmp_path, RECIPES / name, *short)
    cli.main(["export", str(tmp_path / "runs" / Path(name).stem / "checkpoints/last.ckpt"), str(tmp_path / "out")])
    before, after = tensors(place), tensors(tmp_path / "out")
    assert before.keys() == after.keys() and all(before[name].dtype == after[name].dtype for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = torch.tensor([tokenizer.encode("some words")])
    assert torch.isfinite(loaded(tmp_path / "out")(ids).logits).all()


@pytest.mark.full
def test_conversations_are_fine_tuned_on(tmp_path):
    """Of a file of one's own, with the answers' loss in the logs."""
    published_at(tmp_path)
    write_lines(tmp_path / "chats.jsonl", [{"messages": chat(f"some words {i}?", f"others {i}")} for i in range(90)])
    short = ["--data.sequence_length", "128", "--model.init_args.overrides.max_sequence_length", "128"]
    short += ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3"]
    run_ranks(4, tiny_recipe.fit, tmp_path, RECIPES / "sft.yaml", *short, "--data.num_proc", "1")
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    assert sum(bool(row["train_loss"]) for row in rows) == 3 and any(row["val_loss"] for row in rows)
    assert (tmp_path / "runs/sft/checkpoints/last.ckpt").exists()


def published_at(folder: Path) -> Path:
    """What the recipe of fine-tuning begins with, smaller, where it looks for it."""
    place = publish("olmoe", folder / "runs" / "published", vocab_size=320)
    words = (f"document {number} of some words and some others, " for number in range(9))
    train_bpe(words, 300).save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return place


def _built(recipe: Path, folder: Path, *options: str) -> tuple[int, tuple[int, int]]:
    """Instantiate everything a recipe names, without running it."""
    os.chdir(folder)
    if recipe.name in PUBLISHED:
        published_at(folder)
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
