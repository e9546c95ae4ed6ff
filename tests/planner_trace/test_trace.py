"""What a trace shows of layouts that no machine here has, and what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import os
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers.small_runs import traced, write_recipe

from lightning_tex import cli
from lightning_tex.planner.fake_values import Routing
from lightning_tex.planner_trace import trace
from lightning_tex.recipe import Recipe
from lightning_tex.testing.ranks import run_ranks


def of_many_ranks(path):
    before = dict(os.environ), dist.get_debug_level()
    one, all_of_it = (
        traced(path, world, world // 3, {"tensor_parallel_size": 4, "expert_parallel_size": 16}, {})
        for world in (64, 16384)
    )
    assert not dist.is_initialized()
    assert (dict(os.environ), dist.get_debug_level()) == before
    return one, all_of_it


def test_a_trace_of_16384_ranks(tmp_path):
    path = write_recipe(tmp_path, num_layers=2, num_experts=16, capacity_factor=1.0)
    text = path.read_text().replace("global_batch_size: 8", "global_batch_size: 4096")
    path.write_text(text)
    few, many = run_ranks(1, of_many_ranks, path)[0]
    assert (many.layout.world, many.layout.data, many.layout.expert_data) == (16384, 4096, 256)
    # Parameters and gradients are those of fewer ranks, but for padding; what is sharded becomes less.
    assert many.state_bytes["expert_parameters"] < 1.2 * few.state_bytes["expert_parameters"] + 64 * 4 * 256
    assert many.state_bytes["moments"] < few.state_bytes["moments"] / 4
    assert many.parameters == few.parameters
    # A rank's tokens are 1/256 of fewer ranks': so is what it computes, and what it sends over tensor.
    assert few.flops["forward"] == 256 * many.flops["forward"]
    assert 255 < _sent(few, "tensor") / _sent(many, "tensor") < 257
    assert json.loads(json.dumps(many.as_dict()))["layout"]["expert_data"] == 256


def _sent(traced, axis):
    return sum(count for kind, count in traced.sent_bytes.items() if kind.axis == axis and kind.during == "backward")


def even_and_not(path):
    warnings.simplefilter("ignore")
    strategy = {"expert_parallel_size": 4}
    return [trace(Recipe(str(path)), 4, 1, strategy, imbalance=imbalance) for imbalance in (1.0, 2.0)]


def test_imbalance_costs_the_busiest_rank(tmp_path):
    path = write_recipe(tmp_path, num_experts=8, moe_every=1, num_layers=2)
    even, busy = run_ranks(1, even_and_not, path)[0]
    assert busy.state_bytes == even.state_bytes
    assert busy.peak_bytes_by_kind["activations"] > even.peak_bytes_by_kind["activations"]
    experts = 3 * 2 * 64 * 96 * 2 * 2 * 2 * 32  # products, FLOP, D x H, k, layers, tokens of 2 sequences
    assert busy.flops["forward"] - even.flops["forward"] == experts  # twice the rows


@pytest.mark.parametrize("imbalance", [0.5, 1.0, 1.5, 4.0])
def test_routing_by_imbalance(imbalance):
    chosen = Routing(imbalance, parts=4, part=2).choose(1024, 2, 16)
    counts = torch.bincount(chosen.flatten(), minlength=16)
    assert chosen.shape == (1024, 2) and counts.sum() == 2048
    assert counts[8:12].sum() == imbalance * 2048 / 4
    others = counts[[*range(8), *range(12, 16)]]
    assert others.max() - others.min() <= 1 and counts[8:12].max() - counts[8:12].min() <= 1


def attention_flops(path):
    return traced(path, 1, 0, {}, {})


def test_flops_are_those_of_the_products(tmp_path):
    path = write_recipe(tmp_path, num_layers=2, num_kv_heads=2, capacity_factor=None)
    flops = run_ranks(1, attention_flops, path)[0].flops
    tokens, width, hidden, vocabulary = 8 * 32, 64, 96, 300
    attention = 2 * tokens * width * (2 * width + 2 * (width // 2)) + 2 * 2 * tokens * 32 * width
    experts = 3 * 2 * (2 * tokens) * width * hidden + 2 * tokens * width * 4  # two of them, and the router
    dense = 3 * 2 * tokens * width * hidden
    blocks, head = 2 * attention + experts + dense, 2 * tokens * width * vocabulary
    assert flops["forward"] == blocks + 3 * head  # whose gradients are made there
    # Twice that of the blocks, but for attention, whose kernel computes its scores again: 5 products for 2.
    extra = 2 * 2 * tokens * 32 * width // 2
    assert flops["backward"] == 2 * blocks + 2 * extra


def refusals(path):
    warnings.simplefilter("ignore")
    recipe = Recipe(str(path))
    for arguments, words in (
        ({"world_size": 8, "rank": 8}, "rank=8 of a world of 8 ranks"),
        ({"world_size": 8, "imbalance": 0}, "imbalance=0; legal: above 0"),
        ({"world_size": 6, "strategy": {"tensor_parallel_size": 4}}, "tensor_parallel_size=4 does not divide"),
        ({"world_size": 8, "strategy": {"expert_parallel_size": 8}}, "num_experts=4 is not divisible"),
        ({"world_size": 16}, "global_batch_size=8 cannot be shared by a data axis of size 16"),
    ):
        with pytest.raises(ValueError, match=words):
            trace(recipe, **arguments)
        assert not dist.is_initialized()


def test_refused(tmp_path):
    run_ranks(1, refusals, write_recipe(tmp_path))


def command(path):
    warnings.simplefilter("ignore")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.main(
            ["plan", "--trace", "--config", str(path), "--gpus", "8", "--json", "--trainer.precision", "bf16-mixed"]
        )
    return out.getvalue()


def test_command_line(tmp_path):
    text = run_ranks(1, command, write_recipe(tmp_path, num_layers=2))[0]
    shown = json.loads(text.strip().splitlines()[-1])
    assert shown["layout"]["world"] == 8 and shown["layout"]["expert"] == 4
    assert shown["sent_bytes"]["all_to_all/expert/forward"] > 0
    assert "all_to_all over expert" in text
    # Every kind of memory is in the table with what is kept of it.
    assert shown["state_bytes"]["master"] > 0
    assert f"{shown['state_bytes']['moments'] / 1e9:.3f}" in text
