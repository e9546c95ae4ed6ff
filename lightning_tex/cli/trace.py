"""The words of ``lightning-tex plan --trace``."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from lightning_tex.planner_trace.trace import Trace, trace
from lightning_tex.recipe import Recipe


def run(arguments: Sequence[str]) -> None:
    """Trace a recipe, and print what one rank of it takes.

    Args:
        arguments: what follows ``plan`` on the command line, with or without ``--trace``.
    """
    parser = argparse.ArgumentParser(
        "lightning-tex plan --trace",
        description="Run a recipe's model and strategy for two optimizer steps as one rank of a world of any size, in "
        "this process, without its memory, and show what the second allocates, sends and computes. Further options are "
        "the recipe's own, such as --trainer.precision bf16-mixed.",
    )
    parser.add_argument("--trace", action="store_true", help="this dry run")
    parser.add_argument("--config", required=True, help="the recipe")
    parser.add_argument("--gpus", type=int, help="ranks in all (default: the recipe's)")
    parser.add_argument("--rank", type=int, default=0, help="the rank to play (default: 0)")
    parser.add_argument(
        "--imbalance",
        type=float,
        default=1.0,
        help="choices of experts that fall on this rank's, relative to the mean over ranks (default: 1)",
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="whose ways to take (default: cuda, unless the recipe says cpu)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options, more = parser.parse_known_args(arguments)
    recipe = Recipe(options.config, more)
    world = recipe.world_size() if options.gpus is None else options.gpus
    traced = trace(recipe, world, options.rank, imbalance=options.imbalance, device=options.device)
    show(options.config, traced)
    if options.json:
        print(json.dumps({"recipe": options.config, **traced.as_dict()}), flush=True)


def show(name: str, traced: Trace) -> None:
    """Print a trace as tables.

    Args:
        name: of what was traced.
        traced: the trace.
    """
    console = Console(width=max(110, Console().width), highlight=False)
    console.print(f"{name}: {traced.parameters:,} parameters, {traced.layout}; rank {traced.rank}")
    memory = Table("memory", box=SIMPLE, padding=(0, 1))
    for heading in ("kept GB", "at the peak GB", "most GB"):
        memory.add_column(heading, justify="right")
    for kind in dict.fromkeys([*traced.state_bytes, *traced.most_bytes_by_kind]):
        sizes = (of.get(kind, 0) for of in (traced.state_bytes, traced.peak_bytes_by_kind, traced.most_bytes_by_kind))
        memory.add_row(kind.replace("_", " "), *(f"{size / 1e9:.3f}" for size in sizes))
    total = sum(traced.state_bytes.values())
    memory.add_row("[bold]all[/bold]", f"{total / 1e9:.3f}", f"{traced.peak_bytes / 1e9:.3f}", "")
    console.print(memory)
    passes = ("forward", "recompute", "backward", "optimizer")
    sent: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for what, count in traced.sent_bytes.items():
        sent[f"{what.operation} over {what.axis}"][what.during] += count
    traffic = Table("sent in a step, MB", box=SIMPLE, padding=(0, 1))
    for heading in passes:
        traffic.add_column(heading, justify="right")
    for operation, by_pass in sorted(sent.items(), key=lambda item: -sum(item[1].values())):
        traffic.add_row(operation, *(f"{by_pass[p] / 1e6:,.1f}" if by_pass[p] else "" for p in passes))
    console.print(traffic)
    flops = ", ".join(f"{during} {count / 1e12:.2f}" for during, count in traced.flops.items())
    console.print(f"computed in a step, TFLOP of products: {flops}")
    console.print(
        f"Traced in {traced.seconds:.0f} s of processor time. Kept: between steps. At the peak: when most bytes are "
        "live. Most: of this kind, whenever that is. Routing is taken to be even, gradients finite."
    )
