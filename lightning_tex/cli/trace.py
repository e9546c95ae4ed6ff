"""``lightning-tex plan --trace``: what one rank of a recipe takes, seen in a dry run."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

from jsonargparse.typing import PositiveFloat

from lightning_tex.cli.options import Command, Count
from lightning_tex.cli.tables import console, table
from lightning_tex.planner_trace.trace import Trace, trace
from lightning_tex.recipe import Recipe


@dataclass(frozen=True)
class TraceOptions:
    """What is traced.

    Args:
        config: the recipe.
        trace: this dry run, in place of the planner's formulas.
        gpus: ranks in all; left out: the recipe's.
        rank: the one that is played.
        imbalance: choices of experts that fall on this rank's, relative to the mean over ranks.
        device: the one that is pretended; left out: cuda, unless the recipe says cpu.
    """

    config: str
    trace: bool = True
    gpus: Count | None = None
    rank: int = 0
    imbalance: PositiveFloat = 1.0
    device: Literal["cpu", "cuda"] | None = None


def show_trace(options: TraceOptions, more: list[str]) -> dict[str, Any]:
    """Run a recipe's model and strategy for two optimizer steps as one rank of a world of any size, in this process,
    without its memory, and show what the second allocates, sends and computes. Further options are the recipe's own,
    such as --trainer.precision bf16-mixed.
    """
    recipe = Recipe(options.config, more)
    world = recipe.world_size() if options.gpus is None else options.gpus
    traced = trace(recipe, world, options.rank, imbalance=options.imbalance, device=options.device)
    show(options.config, traced)
    return {"recipe": options.config, **traced.as_dict()}


main = Command("plan --trace", show_trace, (TraceOptions,), takes_recipe=True)


def show(name: str, traced: Trace) -> None:
    """Print a trace as tables.

    Args:
        name: of what was traced.
        traced: the trace.
    """
    out = console()
    out.print(f"{name}: {traced.parameters:,} parameters, {traced.layout}; rank {traced.rank}")
    memory = table("memory", "kept GB", "at the peak GB", "most GB", left=["memory"])
    for kind in dict.fromkeys([*traced.state_bytes, *traced.most_bytes_by_kind]):
        sizes = (of.get(kind, 0) for of in (traced.state_bytes, traced.peak_bytes_by_kind, traced.most_bytes_by_kind))
        memory.add_row(kind.replace("_", " "), *(f"{size / 1e9:.3f}" for size in sizes))
    total = sum(traced.state_bytes.values())
    memory.add_row("[bold]all[/bold]", f"{total / 1e9:.3f}", f"{traced.peak_bytes / 1e9:.3f}", "")
    out.print(memory)
    passes = ("forward", "recompute", "backward", "optimizer")
    sent: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for what, count in traced.sent_bytes.items():
        sent[f"{what.operation} over {what.axis}"][what.during] += count
    traffic = table("sent in a step, MB", *passes, left=["sent in a step, MB"])
    for operation, by_pass in sorted(sent.items(), key=lambda item: -sum(item[1].values())):
        traffic.add_row(operation, *(f"{by_pass[p] / 1e6:,.1f}" if by_pass[p] else "" for p in passes))
    out.print(traffic)
    flops = ", ".join(f"{during} {count / 1e12:.2f}" for during, count in traced.flops.items())
    out.print(f"computed in a step, TFLOP of products: {flops}")
    out.print(
        f"Traced in {traced.seconds:.0f} s of processor time. Kept: between steps. At the peak: when most bytes are "
        "live. Most: of this kind, whenever that is. Routing is taken to be even, gradients finite."
    )
