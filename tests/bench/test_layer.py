"""``lightning-tex bench layer``: what it counts and compares, at tiny sizes."""

from __future__ import annotations

import contextlib
import io
import json
from typing import Any

import pytest
import torch

from lightning_tex.bench.layer_shapes import SHAPES, Shape, choices, tokens_that_choose
from lightning_tex.cli.bench import main
from lightning_tex.moe import MoE
from lightning_tex.parallel.errors import UserError
from lightning_tex.testing.ranks import run_ranks

SMALL = Shape("small", 32, 16, 8, 2)
OWN = ("--dim", "32", "--hidden", "16", "--experts", "8", "--tokens", "64", "--turns", "1", "--repeat", "1", "--json")


def bench(*options: str) -> tuple[str, dict[str, Any]]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(["layer", *options])
    *shown, last = printed.getvalue().strip().splitlines()
    return "\n".join(shown), json.loads(last)


@pytest.mark.parametrize("routing", ["balanced", "zipf"])
def test_tokens_go_where_they_shall_through_an_ordinary_router(routing: Any) -> None:
    wanted = choices(SMALL, 500, routing, 1.0)
    assert all(len(set(row)) == 2 for row in wanted.tolist())
    layer = MoE(32, 16, 8, 2)
    for dtype in (torch.float32, torch.bfloat16):
        x = tokens_that_choose(wanted, layer.router.weight.data).to(dtype)
        assert torch.equal(layer.router(x).indices, wanted)
    load = torch.bincount(wanted.flatten(), minlength=8)
    # With equal odds 125 each, within 5 standard deviations; by Zipf's law the first is in most pairs, the last in few.
    assert load.sum() == 1000
    assert (load - 125).abs().max() < 50 if routing == "balanced" else load[0] > 250 > 100 > load[7]


def test_work_and_shapes_are_those_of_the_papers() -> None:
    # Qwen3's 16384 tokens: 3 products of 2048 x 768 for 8 choices each, and 128 logits.
    flops = SHAPES["qwen3-30b-a3b"].forward_flops(16384)
    assert flops == 2 * 16384 * (8 * 3 * 2048 * 768 + 2048 * 128)
    assert [(s.dim, s.hidden, s.experts, s.top_k) for s in SHAPES.values()] == [
        (2048, 1024, 64, 8),
        (2048, 768, 128, 8),
        (4096, 14336, 8, 2),
    ]


def run() -> tuple[str, dict[str, Any]]:
    return bench(*OWN, "--dtype", "float32", "--recomputation", "false", "true")


def test_every_layer_computes_the_same_and_every_column_is_there() -> None:
    ((shown, report),) = run_ranks(1, run)
    cases = report["cases"]
    assert [(c["routing"], c["recomputed"]) for c in cases] == [
        (routing, again) for routing in ("balanced", "zipf") for again in (False, True)
    ]
    for case in cases:
        assert case["skipped"].get("sonic-moe") and "plain loop" in case["layers"]
        flops = case["forward_flops"]
        assert flops == 2 * 64 * 32 * (8 + 3 * 2 * 16)
        for name, row in case["layers"].items():
            assert row["difference"] < 1e-5, name
            assert (row["difference"] == 0) == (name == "ours")
            assert row["synchronisations"] is None and min(row["launches"]) > 10
            assert row["tokens_per_second"][1] == pytest.approx(64 / row["both_ms"] * 1e3)
            assert row["flops_per_second"][1] == pytest.approx(3 * flops / row["both_ms"] * 1e3)
            assert row["share_of_peak"][1] == pytest.approx(
                row["flops_per_second"][1] / case["product_flops_per_second"]
            )
            assert 0 <= row["kept_bytes"] <= row["peak_bytes"]
        kept = case["layers"]["plain loop"]["kept_bytes"]
        # Rows, gate, up, silu(gate), their product and the outputs of 128 choices; the scores of 64 tokens. Where
        # it is recomputed: the state of the random numbers.
        assert kept < 6000 if case["recomputed"] else kept > 4 * (128 * (32 + 4 * 16 + 32) + 64 * 8)
    for word in ("ours", "plain loop", "TFLOP/s", "of peak", "kept MB", "launches", "waits", "recomputed"):
        assert word in shown


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--dim", "32"), "--hidden"),
        (("--dim", "4", "--hidden", "4", "--experts", "8"), "experts=8 is more than dim=4"),
        (("--only", "megablocks"), "plain loop"),
        (("--shapes", "gpt-5"), "olmoe"),
    ],
)
def test_wrong_options_are_told_with_what_is_legal(options: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        bench(*options)
