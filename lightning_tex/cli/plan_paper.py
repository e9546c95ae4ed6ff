"""``lightning-tex plan --reproduce_paper``: the paper's figures beside the planner's.

What the differences come from, and the figure, are in ``benchmarks/paper_figures.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_tex.cli.tables import console, seconds, table, tell
from lightning_tex.planner import paper


def reproduce() -> dict[str, Any]:
    """Compute all figures and print them. Takes about ten seconds."""
    report = paper.reproduce()
    _parameters(report["parameters"])
    _states(report["states"])
    _largest(report["largest_base"])
    _spike(report["spike"])
    _times(report["step_time"])
    return report


def _parameters(found: Mapping[str, Any]) -> None:
    shown = table(
        "", "paper", "its GPT, counted", "our decoder",
        title="Parameters of the 6.7B base with 16 experts, 10^9", left=[""],
    )  # fmt: skip
    for name in ("non_expert", "expert", "total"):
        counted = f"{found['gpt'][name] / 1e9:.3f}", f"{found['own'][name] / 1e9:.3f}"
        shown.add_row(name.replace("_", "-"), f"{found['paper'][name] / 1e9:.2f}", *counted)
    console().print(shown)


def _states(found: list[dict[str, Any]]) -> None:
    shown = table(
        "tensor", "paper", "4P + 12N/G", "our buffers, padding included",
        title="Its states on one of 128 GPUs, ZeRO-1, GB",
    )  # fmt: skip
    for row in found:
        shown.add_row(str(row["tensor"]), *(f"{row[key]:.2f}" for key in ("paper_gb", "formula_gb", "own_gb")))
    console().print(shown)


def _largest(found: list[dict[str, Any]]) -> None:
    tensors = (1, 2, 4, 8)
    shown = table(
        "GPUs", "experts", *(f"tensor {t}" for t in tensors),
        title="Largest base against tensor 1: (1 + x) / (1/Gt + x), x = (E + 2) / G; in brackets the largest GPT-3-"
        "like one that fits V100-16GB by our memory model, 10^9 parameters; * 4 to 8 times",
    )  # fmt: skip
    cells: dict[tuple[int, int], dict[int, str]] = {}
    for row in found:
        base = row["planned_base"]
        text = f"{row['ratio']:.2f}" + ("*" if row["four_to_eight"] else " ")
        planned = "-" if base is None else f"{base / 1e9:.1f}"
        cells.setdefault((row["gpus"], row["experts"]), {})[row["tensor"]] = f"{text} ({planned:>4})"
    for (gpus, experts), by_tensor in cells.items():
        shown.add_row(str(gpus), str(experts), *(by_tensor.get(t, "") for t in tensors))
    console().print(shown)


def _spike(found: list[dict[str, Any]]) -> None:
    shown = table(
        "experts", "elements of a shard, 10^9", "untiled, 4 to 6 bytes each", "ours untiled", "ours tiled",
        "paper untiled", "paper tiled", title="Temporary memory of the optimizer's step, 2.7B base on 32 GPUs, GB",
    )  # fmt: skip
    for row in found:
        low, high = row["untiled_gb"]
        papers = ("" if row[key] is None else f"{row[key]:.1f}" for key in ("paper_untiled_gb", "paper_tiled_gb"))
        shown.add_row(
            str(row["experts"]), f"{row['shard_elements'] / 1e9:.3f}", f"{low:.2f} - {high:.2f}",
            f"{row['own_untiled_gb']:.2f}", f"{row['own_tiled_gb']:.3f}", *papers,
        )  # fmt: skip
    console().print(shown)


def _times(found: Mapping[str, Any]) -> None:
    for machine in found["machines"]:
        shown = table(
            "", "step", "computing", "all-to-all", "tensor axis", "rest", "of peak", "time saved", "speed",
            title="A step of the 40B model, 1024 x 2048 tokens, 128 GPUs, tensor 4, expert 16, micro-batches of "
            f"{machine['micro_batch']}: {machine['cluster']}", left=[""],
        )  # fmt: skip
        for name, row in machine["variants"].items():
            parts, total = row["by_part"], row["step_seconds"]
            computing = sum(parts[key] for key in ("forward", "recompute", "backward"))
            expert = sum(t for key, t in parts.items() if key.endswith("over expert"))
            tensor = sum(t for key, t in parts.items() if key.endswith("tensor"))
            rest = total - computing - expert - tensor
            shown.add_row(
                name, *(seconds(t) for t in (total, computing, expert, tensor, rest)),
                f"{100 * row['of_peak']:.1f} %", f"{100 * row['time_saved']:.1f} %", f"{row['speedup']:.2f}",
            )  # fmt: skip
        console().print(shown)
    gain, peak = found["paper_gain"], found["paper_of_peak"]
    tell(
        f"The paper: {100 * gain['v1']:.0f} % (v1) or {100 * gain['v2']:.0f} % (v2) of time saved; of peak "
        f"{100 * peak['baseline']:.0f} -> {100 * peak['+DTD +CAC']:.0f} %."
    )
