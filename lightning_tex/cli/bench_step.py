"""``lightning-tex bench step``: its options, and its report as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_tex.bench.step import time_steps
from lightning_tex.cli.options import Command, Count
from lightning_tex.cli.tables import console, table, tell
from lightning_tex.recipe import Recipe

_PASSES = ("forward", "recompute", "backward", "between")

LEGEND = (
    "Times of rank 0, medians over steps; parts are timed in further steps, by moments on the device that nothing "
    "waits for. TFLOP/s and MFU: by the products of a forward and twice that of a backward, on whole matrices, "
    "attention over the whole square; what recomputation repeats takes time and is not counted. Rest: embedding, "
    "norms, residuals. Exposed communication: collectives while nothing else runs on the stream, taken off the part "
    "they are in. Between: outside of passes and the optimizer, such as data and hooks."
)


@dataclass(frozen=True)
class StepOptions:
    """What is timed.

    Args:
        config: the recipe.
        steps: optimizer steps that are timed as they are, and again by part.
        warmup: steps before them.
    """

    config: str
    steps: Count = Count(10)
    warmup: Count = Count(3)


def bench_step(options: StepOptions, more: list[str]) -> dict[str, Any] | None:
    """Train a recipe for a few steps and show tokens per second, MFU, and the time of a step by part: attention, MoE,
    head and loss, optimizer, exposed communication; forward and backward apart. Further options are the recipe's own,
    such as --trainer.devices 8.
    """
    report = time_steps(Recipe(options.config, more), options.warmup, options.steps)
    if report is not None:
        show(report)
    return report


def show(report: dict[str, Any]) -> None:
    """Print the report of a step."""
    tell(
        "{recipe}: {layout}; {parameters:,} parameters, {precision}, recomputation {activation_checkpointing}; "
        "{device}, torch {torch}".format(**report)
    )
    tell(
        f"{report['tokens_per_second']:,.0f} tokens/s ({report['tokens_per_second_of_a_device']:,.0f} of a device): "
        f"{report['step_ms']:.4g} ms for {report['tokens']:,} tokens; "
        f"{report['flops_per_second'] / 1e12:.3g} TFLOP/s of a device, {_percent(report['mfu'])} of "
        f"{report['peak']['flops_per_second'] / 1e12:.4g} ({report['peak']['of']})"
        + ("" if report["peak_bytes"] is None else f"; most allocated: {report['peak_bytes'] / 2**30:.2f} GiB")
    )
    shown = table("part", *(f"{name} ms" for name in _PASSES), "all ms", "of step", "TFLOP/s", "MFU", left=["part"])
    for name, row in report["parts"].items():
        times = (f"{row['ms'][during]:.2f}" if during in row["ms"] else "" for during in _PASSES)
        rate = row["flops_per_second"]
        figures = ("", "") if rate is None else (f"{rate / 1e12:.3g}", _percent(row["mfu"]))
        shown.add_row(
            name, *times, f"{row['total_ms']:.2f}", _percent(row["total_ms"] / report["step_ms_by_part"]), *figures
        )
    sums = [sum(row["ms"].get(during, 0.0) for row in report["parts"].values()) for during in _PASSES]
    shown.add_row("all parts", *(f"{time:.2f}" for time in sums), f"{report['step_ms_by_part']:.2f}", "", "", "")
    console().print(shown)
    tell(LEGEND)
    if report["unknown_layers"]:
        tell(f"Not counted, as no formula has them: {', '.join(report['unknown_layers'])}")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


STEP = Command("bench step", bench_step, (StepOptions,), takes_recipe=True)
