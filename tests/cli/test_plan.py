"""``lightning-tex plan``: tables, JSON, bars, recipes, and one line for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import paper
import pytest

from lightning_tex.cli import main, plan, tables
from lightning_tex.cli.plan_recipe import read_recipe
from lightning_tex.parallel.layout import Layout
from lightning_tex.planner.layouts import Candidate, Job
from lightning_tex.planner.memory import size
from lightning_tex.planner.states import FlatBuffers

# Lightning 2.6's own calls.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

RECIPES = Path(__file__).parents[2] / "recipes"
SIZES = ["--dim", "256", "--num_layers", "4", "--num_heads", "4", "--vocab_size", "1000", "--num_experts", "8"]
JOB = ["--cluster", "a100-40gb", "--gpus", "8", "--global_batch_size", "16", "--sequence_length", "128"]


def test_sizes_on_a_cluster(capsys, tmp_path: Path) -> None:
    main(["plan", *SIZES, *JOB, "--capacity_factor", "1.25", "--json", "--plot", str(tmp_path / "bars.png")])
    *table, last = capsys.readouterr().out.strip().splitlines()
    report = json.loads(last)
    best = report["recommended"]
    assert best["fits"] and f"tensor_parallel_size={best['tensor_parallel_size']}" in "".join(table)
    assert {**report["layouts"][best["place"]], **best} == best
    assert any(line.lstrip().startswith("* ") for line in table) and best["reason"] in " ".join(" ".join(table).split())
    assert 1.05 * best["peak_bytes"] <= report["usable_bytes"]
    assert best["peak_bytes"] == sum(best["memory_bytes"].values())
    assert sum(best["step_seconds_by_part"].values()) == pytest.approx(best["step_seconds"])
    assert report["fitting"] == sum(row["fits"] for row in report["layouts"])
    assert {row["optimizer_state_format"] for row in report["layouts"]} == {"fp32", "split", "int8", "stochastic"}
    assert {row["zero_stage"] for row in report["layouts"]} == {0, 1, 2}
    assert (tmp_path / "bars.png").stat().st_size > 10_000
    assert "2mnk" in report["flops"]


def test_choices_are_kept_to(capsys) -> None:
    kept = (
        "--tensor_parallel_size 2 --zero_stage 1 --sequence_parallel true --micro_batch 2 --optimizer_state_format fp32"
    )
    main(["plan", *SIZES, *JOB, *kept.split(), "--activation_checkpointing", "full", "--json"])
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    for row in report["layouts"]:
        assert (row["tensor_parallel_size"], row["zero_stage"], row["sequence_parallel"]) == (2, 1, True)
        assert (row["micro_batch"], row["activation_checkpointing"]) == (2, "full")


def test_sizes_whose_activations_no_formula_has(capsys) -> None:
    layout = "--tensor_parallel_size 2 --expert_parallel_size 2 --zero_stage 1 --sequence_parallel true --micro_batch 2"
    kept = f"{layout} --activation_checkpointing none --optimizer_state_format fp32"
    main(["plan", *SIZES, *JOB, *kept.split(), "--clip_qkv", "8", "--json"])
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert report["activations"] == "traced" and report["layouts"]


def test_a_recipe_on_a_cluster(capsys) -> None:
    main(["plan", "--config", str(RECIPES / "quickstart.yaml"), "--cluster", "h100", "--json"])
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert sum(report["parameters"].values()) == 2_090_688  # as RunSummary says after a run
    assert (report["gpus"], report["global_batch_size"], report["sequence_length"]) == (4, 16, 128)
    assert report["precision"] == "32-true"
    own = report["recipe"]
    assert (own["tensor_parallel_size"], own["expert_parallel_size"], own["zero_stage"]) == (2, 2, 1)
    mask = "--data.init_args.document_mask", "true"
    main(["plan", "--config", str(RECIPES / "quickstart.yaml"), "--cluster", "h100", "--json", *mask])
    masked = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["recipe"]
    tables = 128 * (48 + 24) * 4  # cosines and sines of one sequence, of its micro-batch's eight
    apart = 2 * 8 * 128 * 192 // 2 * 4  # of both layers: in fp32 documents are mixed one by one, and then put together
    assert masked["memory_bytes"]["activations"] - own["memory_bytes"]["activations"] == 7 * tables + apart


def test_a_recipe_of_a_published_model_on_the_cluster_that_it_names(capsys) -> None:
    way = (
        "--tensor_parallel_size 2 --expert_parallel_size 8 --zero_stage 1 --sequence_parallel true --micro_batch 1 "
        "--activation_checkpointing none --optimizer_state_format split"
    )
    main(["plan", "--config", str(RECIPES / "mixtral-8x7b-16xh100.yaml"), *way.split(), "--json"])
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (report["cluster"]["name"], report["gpus"]) == ("h100", 16)
    assert sum(report["parameters"].values()) == 46_702_792_704
    assert report["recipe"]["fits"] and report["recommended"]["step_seconds"] == report["recipe"]["step_seconds"]


OWN = """
trainer: {accelerator: cpu, devices: 4, precision: bf16-mixed}
trainer.strategy:
  class_path: lightning_tex.TexMoEStrategy
  init_args: {tensor_parallel_size: 2, expert_parallel_size: 2, zero_stage: 2}
model:
  class_path: own_module.Regression
  init_args: {width: 128}
"""


def test_a_recipe_with_a_module_of_ones_own(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPES))
    path = tmp_path / "own.yaml"
    path.write_text(OWN)
    job = ["--cluster", "h100", "--global-batch-size", "8192"]
    main(["plan", "--config", str(path), *job, "--json"])
    *table, last = capsys.readouterr().out.strip().splitlines()
    report = json.loads(last)
    assert report["activations"] == "traced" and "Activations: traced" in "".join(table)
    assert report["optimizer"] == {"class": "AdamW", "groups": 1, "assumed": ""}
    width, features, experts = 128, 16, 4
    dense = (features + 1) * width + (width + 1) * width + experts * width + width + 1
    assert report["parameters"]["expert"] == 2 * experts * width * 2 * width
    assert sum(report["parameters"].values()) == dense + report["parameters"]["expert"] and report["sizes"] is None
    own = report["recipe"]
    assert own["layout"].endswith("expert 2 x expert_tensor 2 x expert_data 1") and own["zero_stage"] == 2
    held = report["parameters"]["expert"] // 4
    assert (
        own["memory_bytes"]["expert parameters"] == 2 * held
        and own["memory_bytes"]["activations"] + own["memory_bytes"]["working"] > 0
    )
    # It has no blocks to recompute, and no ends of what sequence parallelism would split.
    assert {(row["activation_checkpointing"], row["sequence_parallel"]) for row in report["layouts"]} == {(None, False)}
    assert report["recommended"]["sent_bytes"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--largest-base", ("decoder", "legal")),
        ("--dim 8", ("dim", "LanguageModel", "--model.init_args")),
        ("--activation-checkpointing full", ("activation_checkpointing='full'", "no blocks")),
    ],
)
def test_what_needs_a_decoder_is_refused_of_other_modules(
    capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, said: tuple[str, ...]
) -> None:
    monkeypatch.syspath_prepend(str(RECIPES))
    path = tmp_path / "own.yaml"
    path.write_text(OWN)
    with pytest.raises(SystemExit):
        main(["plan", "--config", str(path), "--cluster", "h100", "--global-batch-size", "64", *words.split()])
    printed = capsys.readouterr().err
    assert all(word in printed for word in said), printed


def test_the_largest_base_model(capsys) -> None:
    main(["plan", *SIZES, *JOB, "--largest_base", "--micro_batch", "1", "--activation_checkpointing", "full", "--json"])
    printed = capsys.readouterr().out.strip().splitlines()
    report = json.loads(printed[-1])
    assert report["base_parameters"] > 1e9 and report["recommended"]["fits"]
    assert report["recommended"]["peak_bytes"] > 0.9 * report["usable_bytes"]


def test_the_papers_figures_are_shown(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "_largest", lambda: paper._largest_of((128,), (16,)))
    main(["plan", "--reproduce_paper", "--json"])
    printed = capsys.readouterr().out
    for word in ("38.9", "4.52", "34.37", "30.30", "17.00", "10.3", "2.92", "4.29*", "21 %", "26 %", "20 -> 27 %"):
        assert word in printed, word
    assert json.loads(printed.strip().splitlines()[-1])["states"][0]["paper_gb"] == 30.3


def test_where_the_papers_figures_are_is_told_where_there_is_no_clone(
    capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_BENCHMARKS", tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--reproduce_paper"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and "benchmarks/paper_figures.py" in line and "clone" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--cluster tpu --gpus 8", ("tpu", "legal", "h100", "summit-v100-16gb")),
        (f"--gpus 8 {' '.join(SIZES)}", ("--cluster", "legal")),
        ("--cluster none.yaml --gpus 8", ("none.yaml", "does not exist")),
        (f"{' '.join(SIZES)} {' '.join(JOB)} --dim -4", ("dim=-4", "at least 1")),
        (f"{' '.join(SIZES)} {' '.join(JOB)} --gpus -8", ("world=-8", "at least 1")),
        (f"{' '.join(SIZES)} {' '.join(JOB)} --num_experts 1", ("no MoE layer", "num_experts")),
        (f"{' '.join(SIZES)} {' '.join(JOB)} --tensor_parallel_size 3", ("tensor_parallel_size=3", "legal")),
        (f"{' '.join(SIZES)} {' '.join(JOB)} --global_batch_size 7 --micro_batch 2", ("global_batch_size=7",)),
        (f"{' '.join(SIZES)} {' '.join(JOB)} --precision 8-bit", ("precision='8-bit'", "bf16-mixed")),
        (f"{' '.join(JOB)} --dim 8", ("--config", "--num_layers")),
        (f"{' '.join(JOB)} --dim 8 --colour red", ("--colour",)),
        (f"{' '.join(JOB)} --dim wide", ("--dim", "wide")),
        ("--reproduce_paper --plot bars.png", ("--plot", "benchmarks/paper_figures.py")),
        (f"{' '.join(JOB)} --dim 8 --num_layers", ("--num_layers", "whole number")),
        (f"{' '.join(JOB)} --zero_stage 1 3", ("--zero_stage", "3", "legal: 0, 1, 2")),
        (f"--config none.yaml {' '.join(JOB)}", ("none.yaml",)),
        (f"--config {RECIPES}/quickstart.yaml {' '.join(JOB)} --num_experts 1", ("quickstart.yaml", "no MoE layer")),
    ],
)
def test_what_is_wrong_is_one_line(capsys, words: str, said: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *words.split()])
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1
    assert all(word in printed.err for word in said), printed.err


def test_times_and_sizes_have_units() -> None:
    assert tables.seconds(12.345) == "12.3 s" and tables.seconds(0.0123) == "12.3 ms"
    assert size(2 * 2**30) == "2.00 GiB" and size(3 * 2**20) == "3.0 MiB"


PARTLY = """
trainer: {accelerator: cpu, devices: 2, precision: 32-true}
model:
  class_path: lightning_tex.LanguageModel
  init_args:
    config: {vocab_size: 61, dim: 24, num_layers: 2, num_heads: 4, num_experts: 4, hidden_dim: 20, moe_every: 1}
    frozen: [embedding, experts.up]
    lr_scale: {attention: 0.1, experts: 2.0}
data:
  class_path: lightning_tex.TextDataModule
  init_args: {vocab_size: 61, sequence_length: 8, global_batch_size: 4}
"""
SGD = "optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}"
MUON = "optimizer: {class_path: lightning_tex.optim.MuonAdamW, init_args: {lr: 0.1}}"


@pytest.mark.parametrize(("optimizer", "groups"), [("", 4), (SGD, 3), (MUON, 4)])
def test_a_recipe_that_freezes_and_scales_by_pattern(optimizer: str, groups: int, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(PARTLY + optimizer)
    planned = read_recipe(str(tmp_path / "recipe.yaml"))
    read, names = planned.numbers["optimizer"], [parameter.name for parameter in planned.model.parameters]
    grouping = read.grouping(planned.model)
    assert not read.assumed and len(grouping) == groups
    frozen = {name for name in names if "embedding" in name or name.endswith("experts.up")}
    assert {names[place] for group in grouping for place in group} == {*names} - frozen
    flat = FlatBuffers.of(Job(planned.model, 1, 8, 4, "32-true", optimizer=read), Candidate(Layout(1)))
    elements = {parameter.name: parameter.numel for parameter in planned.model.parameters}
    without_states = sum(elements[name] for name in frozen)
    assert sum(buffer.used for buffer in flat.buffers) == sum(elements.values()) - without_states
    assert flat.frozen_dense + flat.frozen_expert == 4 * without_states
