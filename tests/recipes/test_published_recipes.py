"""Recipes of published models: they fit the GPUs that they name, and train, smaller, to a folder for transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import tiny_recipe
from helpers.published_folders import loaded, publish, tensors
from helpers.quantised_folders import quantised

from lightning_tex import cli
from lightning_tex.cli.plan_recipe import own_candidate, read_recipe
from lightning_tex.data.tokenizer import train_bpe
from lightning_tex.models.families import FAMILIES, family_of
from lightning_tex.models.upcycling import Upcycling
from lightning_tex.planner.cluster import GIB, Cluster
from lightning_tex.planner.describe import decoder_parameters
from lightning_tex.planner.layouts import Candidate, Job
from lightning_tex.planner.search import plan
from lightning_tex.planner.step_time import step_time
from lightning_tex.testing.ranks import run_ranks

RECIPES = Path(__file__).parents[2] / "recipes"
CONFIGS = RECIPES / "published"
ROOM = 5 * GIB  # of a GPU, that a plan is to leave


class Toy(NamedTuple):
    """A recipe at toy size.

    Args:
        published: writes what it begins with to a folder.
        ranks: of its layout.
        words: what else is another on the command line.
    """

    published: str
    ranks: int
    words: str


STREAM = "--data.name null --data.streaming false --data.shuffle_buffer 0 "
RECIPE = {
    "finetune-olmoe-1b-7b-1xh100": Toy("olmoe", 2, "--data.global_batch_size 4"),
    "finetune-olmoe-1b-7b-8xh100": Toy("olmoe", 4, "--data.global_batch_size 4"),
    "qwen3-30b-a3b-8xh100": Toy("qwen3-moe", 4, STREAM + "--trainer.strategy.expert_parallel_size 2"),
    "mixtral-8x7b-16xh100": Toy("mixtral", 4, STREAM + "--trainer.strategy.expert_parallel_size 4"),
    "gpt-oss-20b-8xh100": Toy("mxfp4", 4, STREAM + "--trainer.strategy.expert_parallel_size 4"),
    "upcycle-qwen3-0.6b-4xh100": Toy("qwen3", 4, STREAM + "--data.global_batch_size 4"),
}
recipes = pytest.mark.parametrize("name", RECIPE)


def chosen(*names: str) -> pytest.MarkDecorator:
    """These by default, all in full."""
    marked = [pytest.param(name, marks=() if name in names else pytest.mark.full) for name in RECIPE]
    return pytest.mark.parametrize("name", marked)


def test_every_recipe_that_begins_with_a_repository_is_here():
    texts = {path.stem: path.read_text() for path in RECIPES.glob("*xh100.yaml")}
    assert {name for name, text in texts.items() if "pretrained:" in text} == RECIPE.keys()


# --- plans


@recipes
def test_a_plan_reads_it_without_weights_and_for_the_gpus_in_its_name(name):
    job, candidate, cluster = planned(name)
    devices, _, kind = name.rpartition("-")[2].partition("x")
    assert (job.world, cluster.name) == (int(devices), kind)
    assert candidate.micro_batch * candidate.accumulation * candidate.layout.data == job.global_batch_size


@chosen("mixtral-8x7b-16xh100")
def test_it_fits_these_gpus_with_room_for_uneven_routing(name):
    job, candidate, cluster = planned(name)
    assert plan(replace(job, imbalance=1.5), candidate, cluster).memory.peak <= cluster.usable_bytes - ROOM
    assert step_time(job, candidate, cluster).mfu > 0.25


def planned(name: str) -> tuple[Job, Candidate, Cluster]:
    """What a recipe says: what is trained, how, and on what."""
    recipe = read_recipe(str(RECIPES / f"{name}.yaml"))
    cluster, numbers = Cluster.named(recipe.cluster), recipe.numbers
    job = Job(
        recipe.model, numbers["gpus"], numbers["sequence_length"], numbers["global_batch_size"], numbers["precision"],
        1.0, numbers["optimizer"], numbers["activations"], numbers["document_mask"],
    )  # fmt: skip
    return job, own_candidate(job, recipe.strategy, cluster.gpus_per_node), cluster


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.json")), ids=lambda file: file.stem)
def test_a_published_configuration_has_the_parameters_of_transformers(file):
    transformers = pytest.importorskip("transformers")
    theirs = json.loads(file.read_text())
    kind = transformers.AutoConfig.for_model(**{k: v for k, v in theirs.items() if k != "quantization_config"})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(kind)
    assert decoder_parameters(family_of(theirs, file.name).config(theirs)) == model.num_parameters()


def test_the_upcycled_configuration_is_what_upcycling_writes():
    dense, routed = (json.loads((CONFIGS / f"{name}.json").read_text()) for name in ("Qwen3-0.6B", "Qwen3-0.6B-8x"))
    family = family_of(dense, "Qwen3-0.6B")
    experts = FAMILIES[family.with_experts[0]]
    config = Upcycling(8, 2).config(family.config(dense), experts)
    assert {**dense, **experts.described(config)} == routed
    assert not experts.differences(routed, config)


# --- runs

WORDS = (
    "--trainer.accelerator cpu --trainer.num_nodes 1 --trainer.accumulate_grad_batches 1 --trainer.max_steps 10 "
    "--trainer.log_every_n_steps 1 --trainer.callbacks+ lightning.pytorch.callbacks.ModelCheckpoint "
    "--trainer.callbacks.dirpath checkpoints --trainer.callbacks.save_last true "
    "--trainer.callbacks.every_n_train_steps 10 --data.path text --data.vocab_size 320 "
    "--data.sequence_length 32 --data.num_workers 0 --optimizer.lr 1e-2 --lr_scheduler.total_iters 1"
)


@chosen("finetune-olmoe-1b-7b-1xh100")
def test_at_toy_size_it_learns_and_is_exported_to_a_folder_that_transformers_loads(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    toy = RECIPE[name]
    folder, text = published_at(toy.published, tmp_path), tmp_path / "text"
    text.mkdir()
    for number in range(12):
        (text / f"{number}.txt").write_text(f"document {number} of some words and some others, " * 40)
    places = ["--model.init_args.pretrained", str(folder), "--data.tokenizer", str(folder)]
    words = [*places, *WORDS.split(), "--trainer.devices", str(toy.ranks), *toy.words.split()]
    run_ranks(toy.ranks, tiny_recipe.fit, tmp_path, RECIPES / f"{name}.yaml", *words)
    losses = tiny_recipe.losses(tmp_path)
    assert len(losses) == 10 and sum(losses[-3:]) < 0.9 * sum(losses[:3])
    cli.main(["export", str(tmp_path / "checkpoints/last.ckpt"), str(tmp_path / "out")])
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert all(value.dtype == torch.bfloat16 for value in tensors(tmp_path / "out").values())
    ids = torch.tensor([transformers.AutoTokenizer.from_pretrained(tmp_path / "out").encode("some words and")])
    assert torch.isfinite(loaded(tmp_path / "out")(ids).logits).all()


def published_at(case: str, place: Path) -> Path:
    """What a recipe begins with, smaller: a tiny model of its family with a tokenizer."""
    folder = place / "published"
    if case == "mxfp4":
        quantised(case, folder, vocab_size=320)
    else:
        publish(case, folder, torch.bfloat16, vocab_size=320)
    words = (f"document {number} of some words and some others, " for number in range(9))
    train_bpe(words, 300).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    if case != "qwen3":
        return folder
    cli.main(["upcycle", str(folder), str(place / "upcycled"), "--num_experts", "8", "--top_k", "2", "--noise", "0.02"])
    return place / "upcycled"
