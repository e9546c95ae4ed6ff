"""Growth of memory, bytes and time with ranks, experts and base size, as tables and as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_tex.cli.plan_tables import row, waiting_seconds
from lightning_tex.cli.tables import console, figure, parts_in, save, seconds, stack, table
from lightning_tex.planner import scaling
from lightning_tex.planner.cluster import GIB, Cluster
from lightning_tex.planner.layouts import Choices, Job
from lightning_tex.planner.memory import size
from lightning_tex.planner.scaling import Point

TITLES = {
    "ranks": "Weak scaling: as many sequences on every rank",
    "experts": "More experts on as many ranks",
    "width": "Larger GPT-3 bases on as many ranks",
    "tensor": "The tensor axis alone, all else at its best",
    "expert": "The expert axis alone, all else at its best",
}


def report(job: Job, cluster: Cluster, choices: Choices) -> dict[str, Any]:
    """All series, and where the axes stop paying."""
    within = replace(choices, most_tensor=cluster.gpus_per_node)
    series = {
        "ranks": scaling.by_ranks(job, cluster, within),
        "experts": scaling.by_experts(job, cluster, within),
        "width": scaling.by_width(job, cluster, within),
        "tensor": scaling.by_axis(job, cluster, choices, "tensor"),
        "expert": scaling.by_axis(job, cluster, choices, "expert"),
    }
    return {
        "cluster": cluster.name,
        "gpus": job.world,
        "usable_bytes": cluster.usable_bytes,
        "series": {name: [_point(p) for p in points] for name, points in series.items()},
        "pays_up_to": {axis: scaling.pays_up_to(series[axis]) for axis in ("tensor", "expert") if series[axis]},
    }


def _point(point: Point) -> dict[str, Any]:
    sent = {"at": point.at, "sent_bytes_by_axis": point.sent, "tokens_per_second_of_a_rank": point.tokens_per_second}
    return {**row(point.planned), **sent}


def show(found: Mapping[str, Any]) -> None:
    """Print every series as a table."""
    out = console()
    for name, points in found["series"].items():
        out.print(f"\n{TITLES[name]}: {found['cluster']}" + ("" if name == "ranks" else f", {found['gpus']} ranks"))
        headings = ("t x e x et", "ZeRO, micro", "memory", "sent", "step", "waiting", "tokens/s of a rank", "MFU")
        listed = table(name, *headings)
        for p in points:
            axes = " x ".join(str(p[f"{axis}_parallel_size"]) for axis in ("tensor", "expert", "expert_tensor"))
            listed.add_row(
                str(p["at"]), axes, f"{p['zero_stage']}, {p['micro_batch']}",
                size(p["peak_bytes"]) + ("" if p["fits"] else " !"), size(sum(p["sent_bytes_by_axis"].values())),
                seconds(p["step_seconds"]), f"{100 * waiting_seconds(p) / p['step_seconds']:.0f} %",
                f"{p['tokens_per_second_of_a_rank']:,.0f}", f"{100 * p['mfu']:.1f} %",
            )  # fmt: skip
        out.print(listed)
    for axis, last in found["pays_up_to"].items():
        gained = f"{100 * scaling.WORTH:.0f} %"
        paying = "at no size: none fits" if last is None else f"up to {last}: no other size is {gained} faster"
        out.print(f"The {axis} axis pays {paying}.")


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw memory, bytes sent and time against ranks, experts and width; one row of panels each."""
    names = ("ranks", "experts", "width")
    drawn = figure(16, 13)
    grid = drawn.subplots(len(names), 3)
    columns = (
        ("memory_bytes", GIB, "GiB of a rank; dashed: what tensors can use"),
        ("sent_bytes_by_axis", GIB, "GiB sent by a rank in a step, by axis"),
        ("step_seconds_by_part", 1.0, "seconds of a step"),
    )
    for i, (name, panels) in enumerate(zip(names, grid, strict=True)):
        # One that is far too large would be all that is seen.
        points = [p for p in found["series"][name] if p["fits"] or name != "width"]
        labels = [f"{name} {p['at']}" for p in points]
        for panel, (key, unit, label) in zip(panels, columns, strict=True):
            parts = parts_in(p[key] for n in names for p in found["series"][n])
            stack(panel, labels, [p[key] for p in points], parts, unit)
            panel.invert_yaxis()
            panel.set_xlabel(label)
            if i == len(names) - 1:
                panel.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
        panels[0].axvline(found["usable_bytes"] / GIB, color="black", linestyle="--", linewidth=1)
        panels[1].set_title(TITLES[name], fontsize=10)
    save(drawn, path, dpi=90)
