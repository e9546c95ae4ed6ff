"""``lightning-tex bench step`` on as much of a recipe's decoder as one GPU has memory for.

    python benchmarks/gpu_step.py --config benchmarks/gpu_olmoe.yaml --steps 10 [--trainer.precision bf16-mixed ...]

By the plan, in this order: states in fp32, in 8 bits, in 8 bits with recomputation, each with all layers; then in
8 bits with as many layers as fit. What was taken is in the report, under ``fitted``.
"""

from __future__ import annotations

import argparse
import json
from bisect import bisect_right
from typing import Any, NamedTuple

import torch

from lightning_tex.bench.step import time_steps
from lightning_tex.cli.bench_step import show
from lightning_tex.cli.plan_recipe import own_candidate, read_recipe
from lightning_tex.planner.layouts import Job
from lightning_tex.planner.memory import memory, size
from lightning_tex.recipe import Recipe

MARGIN = 0.05  # of a plan (docs/planner.md)


class Way(NamedTuple):
    """Options of the strategy."""

    optimizer_state_format: str
    activation_checkpointing: str | None


CUT = Way("int8", None)
WAYS = (Way("fp32", None), CUT, Way("int8", "full"))


def fitted(config: str, more: list[str], device_bytes: float) -> dict[str, Any]:
    """The first way to train a recipe's decoder, or the most layers of it, whose plan fits.

    Args:
        config: the recipe.
        more: options of it.
        device_bytes: that tensors can use.
    """
    layers = read_recipe(config, more).model.config.num_layers  # type: ignore[union-attr]

    def planned(kept: int, way: Way) -> int:
        return _planned(config, [*more, *_options(kept, way)])

    room = device_bytes * (1 - MARGIN)
    kept, way = layers, next((way for way in WAYS if planned(layers, way) <= room), None)
    if way is None:
        way = CUT
        kept = bisect_right(range(1, layers), room, key=lambda kept: planned(kept, CUT))
    if not kept:
        raise SystemExit(f"not one layer of {config} fits {size(int(device_bytes))}")
    return {
        "layers": kept,
        "of_layers": layers,
        **way._asdict(),
        "planned_bytes": planned(kept, way),
        "options": _options(kept, way),
    }


def _options(layers: int, way: Way) -> list[str]:
    strategy = "--trainer.strategy.init_args."
    return [
        "--model.init_args.config.num_layers", str(layers),
        f"{strategy}optimizer_state_format", way.optimizer_state_format,
        f"{strategy}activation_checkpointing", way.activation_checkpointing or "null",
    ]  # fmt: skip


def _planned(config: str, words: list[str]) -> int:
    recipe = read_recipe(config, words)
    numbers = recipe.numbers
    job = Job(
        recipe.model, numbers["gpus"], numbers["sequence_length"], numbers["global_batch_size"], numbers["precision"],
        optimizer=numbers["optimizer"],
    )  # fmt: skip
    candidate = own_candidate(job, recipe.strategy)
    assert candidate is not None
    return memory(job, candidate).peak


def main() -> None:
    """Find what fits, train it for a few steps, and print its table and, as the last line, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the recipe; further options are its own")
    parser.add_argument("--steps", type=int, default=10, help="timed as they are, and again by part")
    parser.add_argument("--warmup", type=int, default=3, help="steps before")
    parser.add_argument("--gib", type=float, help="memory that may be used (default: the GPU's; without one needed)")
    options, more = parser.parse_known_args()
    if options.gib is None and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: --gib is needed")
    device_bytes = torch.cuda.mem_get_info()[0] if options.gib is None else options.gib * 2**30
    way = fitted(options.config, more, device_bytes)
    taken = "all" if way["layers"] == way["of_layers"] else f"{way['layers']} of {way['of_layers']}"
    print(f"{taken} layers, {way['optimizer_state_format']} states, planned {size(way['planned_bytes'])}", flush=True)
    report = time_steps(Recipe(options.config, [*more, *way["options"]]), options.warmup, options.steps)
    if report is not None:
        show(report)
        print(json.dumps({**report, "fitted": way}))


if __name__ == "__main__":
    main()
