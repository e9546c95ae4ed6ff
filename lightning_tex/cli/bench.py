"""The words of ``lightning-tex bench``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from lightning_tex.bench import calibrate, communication, optimizer
from lightning_tex.bench.candidates import OPTIMIZERS, Workload
from lightning_tex.bench.combinations import COMBINATIONS
from lightning_tex.optim.state_config import OPTIMIZER_STATE_FORMATS
from lightning_tex.planner.cluster import Cluster
from lightning_tex.recipe import Recipe


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-tex bench``.

    Args:
        arguments: what follows ``bench`` on the command line.
    """
    parser = argparse.ArgumentParser("lightning-tex bench", description="Measure where it runs.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    add_communication(kinds)
    add_optimizer(kinds)
    add_calibrate(kinds)
    options, more = parser.parse_known_args(arguments)
    options.run(options, more)


def add_communication(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``bench communication``: a recipe under every combination of communication options."""
    names = [name.strip() for name in COMBINATIONS]
    parser = kinds.add_parser(
        "communication",
        help="step time and bytes sent under every combination of communication options",
        description="Train a recipe's model for a few steps under every combination of communication options, in "
        "turns, and show step time, speed against the baseline (full recomputation, no duplicate-token dropping) and "
        "bytes sent by axis. Further options are the recipe's own, such as --trainer.devices 8.",
    )
    parser.add_argument("--config", required=True, help="the recipe")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps timed together (default: 5)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (default: 2)")
    parser.add_argument("--turns", type=int, default=3, help="turns of all combinations (default: 3)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {names}; baseline is added")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")

    def run(options: argparse.Namespace, recipe_options: list[str]) -> None:
        if min(options.steps, options.turns, options.warmup) < 1:
            parser.error("--steps, --turns and --warmup must be at least 1")
        wanted = {name.strip() for name in options.only or names}
        if unknown := wanted - set(names):
            parser.error(f"--only {sorted(unknown)}; legal: {names}")
        combinations = {n: c for n, c in COMBINATIONS.items() if n.strip() in wanted or n == "baseline"}
        recipe = Recipe(options.config, recipe_options)
        communication.run(recipe, combinations, options.warmup, options.steps, options.turns, options.json)

    parser.set_defaults(run=run)


def add_optimizer(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``bench optimizer``: the optimizer step alone, beside other implementations."""
    parser = kinds.add_parser(
        "optimizer",
        help="temporary memory, time and bytes of state of the optimizer step, beside other implementations",
        description="Step made-up parameters with the tiled optimizer, the same untiled, torch's own, and the sharded "
        "ones of torch and DeepSpeed where they can be had, and show the most temporary memory in a step, time, and "
        "bytes of state. Under torchrun the layout is that of its processes, and rank 0 reports.",
    )
    parser.add_argument("--elements", nargs="+", type=whole, metavar="N", help="parameters of a rank (1e6 1e7 1e8)")
    parser.add_argument(
        "--experts", nargs="+", type=whole, metavar="E", help="experts of a block: more sizes (4 8 16 32 64)"
    )
    parser.add_argument("--width", type=whole, default=256, help="of that block: 4 w^2 dense, 8 w^2 an expert (256)")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument(
        "--formats", nargs="+", choices=OPTIMIZER_STATE_FORMATS, default=["fp32"], help="of the tiled step's states"
    )
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="AdamW")
    parser.add_argument("--tile-size", type=whole, help="elements in a tile (default: the strategy's)")
    parser.add_argument("--tensor-parallel-size", type=whole, default=1)
    parser.add_argument("--expert-parallel-size", type=whole, default=1)
    parser.add_argument(
        "--turns", type=whole, help="steps timed of each, in turns (default: 15 to 300, more of small sizes)"
    )
    parser.add_argument("--builds", type=whole, default=5, help="times that all are made anew in between (default: 5)")
    parser.add_argument("--threads", type=whole, default=1, help="of torch, on CPU (default: 1)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory-gib", type=float, help="memory that may be taken (default: half of what is free)")
    parser.add_argument("--plot", type=Path, help="draw temporary memory to this file (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")

    def run(options: argparse.Namespace, more: list[str]) -> None:
        if more:
            parser.error(f"unknown: {' '.join(more)}")
        if options.plot and find_spec("matplotlib") is None:
            parser.error("--plot needs matplotlib; legal: pip install matplotlib, or no --plot")
        if options.device == "cuda" and not torch.cuda.is_available():
            parser.error("--device cuda, but torch sees no CUDA device; legal: cpu")
        torch.set_num_threads(options.threads)
        device = torch.device(options.device)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        topology = optimizer.join(options.tensor_parallel_size, options.expert_parallel_size, device)
        elements, experts = options.elements or [], options.experts or []
        if not elements and not experts:
            elements, experts = [10**6, 10**7, 10**8], [4, 8, 16, 32, 64]
        workloads = [
            Workload(n, e, options.width, getattr(torch, dtype), device, options.optimizer, topology)
            for dtype in options.dtype
            for n, e in [*((n, None) for n in elements), *((None, e) for e in experts)]
        ]
        free = optimizer.free_bytes(device, topology) // 2
        limit = free if options.memory_gib is None else int(options.memory_gib * 2**30)
        plan = optimizer.Plan(workloads, options.tile_size, options.formats, options.turns, options.builds, limit)
        optimizer.run(plan, options.json, options.plot)

    parser.set_defaults(run=run)


def add_calibrate(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``bench calibrate``: the profile of this machine, for ``lightning-tex plan --cluster``."""
    parser = kinds.add_parser(
        "calibrate",
        help="measure this machine's profile for lightning-tex plan",
        description="Measure products, memory and collectives with all ranks at work, and write the YAML that "
        "`lightning-tex plan --cluster FILE` reads. Ranks are those of torchrun, on every node, or as many as --ranks "
        "says on this machine.",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.yaml", help="where the profile goes")
    parser.add_argument("--ranks", type=whole, help="without torchrun: processes (default: the GPUs, else 4)")
    parser.add_argument("--like", help="a built-in cluster whose data-sheet peak and memory the GPUs have")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--megabytes", type=whole, help="of the tensors sent (default: 8 on CPU, 64 on GPUs)")
    parser.add_argument("--turns", type=whole, default=7, help="of which the median counts (default: 7)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")

    def run(options: argparse.Namespace, more: list[str]) -> None:
        if more:
            parser.error(f"unknown: {' '.join(more)}")
        if options.output.suffix not in (".yaml", ".yml"):
            parser.error(f"--output {options.output}; legal: a .yaml file")
        if options.device == "cuda" and not torch.cuda.is_available():
            parser.error("--device cuda, but torch sees no CUDA device; legal: cpu")
        like = None if options.like is None else Cluster.named(options.like)
        megabytes = options.megabytes or (64 if options.device == "cuda" else 8)
        task = calibrate.Task(options.device, megabytes << 20, options.turns, like)
        calibrate.run(task, options.ranks, options.output, options.json)

    parser.set_defaults(run=run)


def whole(text: str) -> int:
    """A positive whole number, also as 1e6."""
    try:
        number = float(text)
    except ValueError:
        number = 0
    if number < 1 or number != int(number):
        raise argparse.ArgumentTypeError(f"{text}; legal: a whole number of at least 1, such as 4 or 1e6")
    return int(number)
