"""Formulas against traces of the real model and strategy at the world sizes of the large recipes."""

from __future__ import annotations

import json
import warnings
from fractions import Fraction
from pathlib import Path

import pytest

from lightning_tex.cli.plan_recipe import own_candidate, read_recipe
from lightning_tex.parallel.byte_meter import Sent
from lightning_tex.planner.cluster import CLUSTERS
from lightning_tex.planner.collective import sent_bytes
from lightning_tex.planner.layouts import Job
from lightning_tex.planner.memory import memory
from lightning_tex.planner.traffic import step_collectives
from lightning_tex.planner.work import computation
from lightning_tex.planner_trace import trace
from lightning_tex.recipe import Recipe
from lightning_tex.testing.ranks import run_ranks

RECIPES = Path(__file__).parents[2] / "recipes"
# Few blocks: the trace of all takes a minute.
FEWER = ["--trainer.accumulate_grad_batches", "2", "--model.config.num_layers", "2"]
CASES = {
    "ted-40b-128xa100": [{}, {"zero_stage": 2, "activation_checkpointing": None}, {"duplicate_token_dropping": False}],
    "mixtral-8x7b-64xh100": [{}, {"optimizer_state_format": "int8", "activation_checkpointing": "full"}],
}
DEFAULT = ("ted-40b-128xa100", {})


def both(path: str, strategy: dict[str, object]) -> dict[str, object]:
    warnings.simplefilter("ignore")
    recipe = Recipe(path, FEWER)
    traced = trace(recipe, recipe.world_size(), 5, strategy)
    planned_recipe = read_recipe(path, FEWER)
    numbers, config = planned_recipe.numbers, planned_recipe.model.config
    assert config is not None
    job = Job(
        planned_recipe.model, recipe.world_size(), numbers["sequence_length"], numbers["global_batch_size"],
        numbers["precision"],
        optimizer=numbers["optimizer"],
    )  # fmt: skip
    candidate = own_candidate(job, {**planned_recipe.strategy, **strategy})
    assert candidate is not None and candidate.layout == traced.layout
    planned = memory(job, candidate)
    states = {**vars(planned.states)}
    states["moments"] += states.pop("scalars")
    assert {k: n for k, n in traced.state_bytes.items() if n} == {k: n for k, n in states.items() if n}

    sent = sent_bytes(step_collectives(job, candidate))
    # What all ranks agree upon: whether batches are alike, and where a stream ends.
    agreed = Sent("all_gather", "world", "forward")
    found = {kind: Fraction(count) for kind, count in traced.sent_bytes.items() if kind != agreed}
    # The trace counts what a causal kernel skips.
    shares = candidate.layout.data * candidate.layout.tensor
    half = 2 * job.tokens * job.sequence_length * config.dim * config.num_layers / shares
    skipped = half * (1 + 2.5 + (candidate.activation_checkpointing is not None))
    flops = candidate.accumulation * computation(job, candidate, CLUSTERS["h100"]).flops + skipped
    return {
        "sent": {str(k): (float(found.get(k, 0)), float(sent.get(k, 0))) for k in {*found, *sent}},
        "peak": planned.peak / traced.peak_bytes,
        "flops": flops / sum(traced.flops.values()),
    }


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        pytest.param(name, strategy, marks=[] if (name, strategy) == DEFAULT else pytest.mark.full)
        for name, strategies in CASES.items()
        for strategy in strategies
    ],
)
def test_formulas_are_what_a_trace_shows(name: str, strategy: dict[str, object]) -> None:
    found = run_ranks(1, both, str(RECIPES / f"{name}.yaml"), strategy, detail=False)[0]
    different = {kind: pair for kind, pair in found["sent"].items() if pair[0] != pair[1]}
    assert not different, json.dumps(different, indent=1)
    assert found["peak"] == pytest.approx(1, abs=0.05)
    assert found["flops"] == pytest.approx(1, abs=1e-9), found["flops"]
