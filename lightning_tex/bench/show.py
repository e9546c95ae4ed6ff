"""A table and a plot of the optimizer bench's report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

LEGEND = (
    "Temp: the most that a step holds at once above what stays. B/param: bytes of parameters, gradients and states "
    "on this rank. Times: medians over steps in turns; to fused: of the ratios to torch fused in the same turn. Moved: "
    "the least bytes that a step reads and writes for an element; GB/s: these by the time."
)


def tell(text: str) -> None:
    """Print a paragraph."""
    Console(width=max(110, Console().width), highlight=False).print(text)


def tabulate(case: dict[str, Any]) -> None:
    """Print a case of the report as a table."""
    console = Console(width=max(110, Console().width), highlight=False)
    experts = "" if case["experts"] is None else f" of a block with {case['experts']} experts"
    table = Table(box=SIMPLE, padding=(0, 1), title_justify="left")
    what = f"{case['elements']:,} elements{experts}, {case['dtype']}, {case['turns']} turns"
    table.title = f"{what}; a copy: {case['copy_gb_per_s']:.1f} GB/s"
    table.add_column("", no_wrap=True)
    for heading in ("temp MB", "B/param", "step ms", "to fused", "CPU ms", "to fused", "moved B", "GB/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in case["candidates"].items():
        table.add_row(name, *_cells(row, case["elements"]))
    console.print(table)
    for name, reason in case["skipped"].items():
        console.print(f"skipped: {name}: {reason}")


def _cells(row: dict[str, Any], elements: int) -> list[str]:
    cells = [f"{row['peak_temporary_bytes'] / 1e6:.1f}", f"{row['state_bytes_per_parameter']:.2f}"]
    if row["step_ms"] is None:
        return [*cells, "no room", *[""] * 5]
    for time, ratio in (("step_ms", "ratio"), ("cpu_ms", "cpu_ratio")):
        cells += [f"{row[time]:.2f}", "" if row[ratio] is None else f"{row[ratio]:.2f}"]
    if row["moved_bytes"] is None:
        return [*cells, "", ""]
    return [*cells, f"{row['moved_bytes'] / elements:.1f}", f"{row['gb_per_s']:.1f}"]


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw temporary memory against elements and against experts, one row for each dtype."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = report["cases"]
    dtypes = list(dict.fromkeys(case["dtype"] for case in cases))
    against = [key for key in ("elements", "experts") if any(_belongs(case, key) for case in cases)]
    figure = Figure(figsize=(1.8 + 4.6 * len(against), 3.6 * len(dtypes)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(dtypes), len(against), squeeze=False)
    for row, dtype in zip(axes, dtypes, strict=True):
        for axis, key in zip(row, against, strict=True):
            found = [case for case in cases if case["dtype"] == dtype and _belongs(case, key)]
            names = list(dict.fromkeys(name for case in found for name in case["candidates"]))
            for order, name in enumerate(names):
                points = [(case[key], case["candidates"][name]) for case in found if name in case["candidates"]]
                megabytes = [row["peak_temporary_bytes"] / 1e6 for _, row in points]
                style = {"color": "black", "linewidth": 2} if name == "tiled" else {"linestyle": "--"}
                # Lines may coincide: earlier ones above, with smaller dots.
                axis.plot(
                    [x for x, _ in points], megabytes, marker="o", ms=4 + order, zorder=9 - order, label=name, **style
                )
            axis.set_xscale("log", base=10 if key == "elements" else 2)
            axis.set_yscale("symlog", linthresh=1)  # some need nothing, which a logarithm cannot show
            axis.set_ylim(bottom=0)
            axis.set_xlabel(key)
            axis.set_ylabel("temporary MB in a step")
            axis.set_title(f"{report['optimizer']}, {dtype}", fontsize=10)
            axis.grid(alpha=0.3)
        row[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def _belongs(case: dict[str, Any], key: str) -> bool:
    return (case["experts"] is None) == (key == "elements")
