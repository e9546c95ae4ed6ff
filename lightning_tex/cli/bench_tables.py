"""What ``lightning-tex bench`` reports, as tables and as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_tex.cli.tables import console, figure, save, table, tell, tell_line
from lightning_tex.planner.cluster import Cluster

LEGEND = (
    "Temp: the most that a step holds at once above what stays. B/param: bytes of parameters, gradients and states "
    "on this rank. Times: medians over steps in turns; to fused: of the ratios to torch fused in the same turn. Moved: "
    "the least bytes that a step reads and writes for an element; GB/s: these by the time."
)


def show_communication(report: dict[str, Any]) -> None:
    """Print a report of the communication bench."""
    rows = report["combinations"]
    axes = dict.fromkeys(a for row in rows.values() for a, sent in row["sent_bytes_by_axis"].items() if sent >= 5e3)
    shown = table("", "step ms", "speed", "CPU ms", *axes, "stash", left=[""])
    for name, row in rows.items():
        sent = (f"{row['sent_bytes_by_axis'].get(axis, 0) / 1e6:.2f}" for axis in axes)
        stash = max(row["stash_bytes_by_block"].values(), default=0) / 1e6
        times = f"{row['step_ms']:.0f}", f"{row['speedup']:.2f}", f"{row['cpu_ms_per_step_all_ranks']:.0f}"
        shown.add_row(name if name[0] in "b+" else f"  {name}", *times, *sent, f"{stash:.2f}")
    tell(f"{report['recipe']}: {report['layouts'][0]}")
    console().print(shown)
    tell(
        f"Medians of {report['turns']} turns of {report['steps']} steps. Speed: against the baseline, which recomputes "
        "everything and drops no duplicates; an indented row adds to the row above it. CPU: all ranks together. By "
        "axis: MB that one rank sends in a step, by ring costs. Stash: MB that the largest block's tape keeps."
    )
    for name, reason in report["skipped"].items():
        tell(f"skipped: {name}: {reason}")


def show_profile(cluster: Cluster, output: Path, one_node: bool) -> None:
    """Print a measured profile, and where it is."""
    for name, value in cluster.as_dict().items():
        tell(f"{name:20} {value:.4g}" if isinstance(value, float) else f"{name:20} {value}")
    if one_node:
        tell("Only one node was measured: the network between nodes is written as fast as the links inside.")
    tell_line(f"Written to {output}.")


def show_steps(case: dict[str, Any]) -> None:
    """Print a case of the optimizer bench."""
    experts = "" if case["experts"] is None else f" of a block with {case['experts']} experts"
    what = f"{case['elements']:,} elements{experts}, {case['dtype']}, {case['turns']} turns"
    headings = ("temp MB", "B/param", "step ms", "to fused", "CPU ms", "to fused", "moved B", "GB/s")
    shown = table("", *headings, title=f"{what}; a copy: {case['copy_gb_per_s']:.1f} GB/s", left=[""])
    for name, row in case["candidates"].items():
        shown.add_row(name, *_cells(row, case["elements"]))
    console().print(shown)
    for name, reason in case["skipped"].items():
        tell(f"skipped: {name}: {reason}")


def _cells(row: dict[str, Any], elements: int) -> list[str]:
    cells = [f"{row['peak_temporary_bytes'] / 1e6:.1f}", f"{row['state_bytes_per_parameter']:.2f}"]
    if row["step_ms"] is None:
        return [*cells, "no room", *[""] * 5]
    for time, ratio in (("step_ms", "ratio"), ("cpu_ms", "cpu_ratio")):
        cells += [f"{row[time]:.2f}", "" if row[ratio] is None else f"{row[ratio]:.2f}"]
    if row["moved_bytes"] is None:
        return [*cells, "", ""]
    return [*cells, f"{row['moved_bytes'] / elements:.1f}", f"{row['gb_per_s']:.1f}"]


def draw_steps(report: dict[str, Any], path: Path) -> None:
    """Draw temporary memory of optimizer steps against elements and against experts, one row for each dtype."""
    cases = report["cases"]
    dtypes = list(dict.fromkeys(case["dtype"] for case in cases))
    against = [key for key in ("elements", "experts") if any(_belongs(case, key) for case in cases)]
    drawn = figure(1.8 + 4.6 * len(against), 3.6 * len(dtypes))
    axes = drawn.subplots(len(dtypes), len(against), squeeze=False)
    for row, dtype in zip(axes, dtypes, strict=True):
        for axis, key in zip(row, against, strict=True):
            alike = [case for case in cases if case["dtype"] == dtype and _belongs(case, key)]
            names = list(dict.fromkeys(name for case in alike for name in case["candidates"]))
            for order, name in enumerate(names):
                points = [(case[key], case["candidates"][name]) for case in alike if name in case["candidates"]]
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
    save(drawn, path)


def _belongs(case: dict[str, Any], key: str) -> bool:
    return (case["experts"] is None) == (key == "elements")
