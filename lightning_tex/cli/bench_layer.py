"""``lightning-tex bench layer``: its options, and its report as tables."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveFloat

from lightning_tex.bench import layer
from lightning_tex.bench.layer_contestants import PEERS
from lightning_tex.bench.layer_shapes import SHAPES, Routing, Shape
from lightning_tex.cli.options import Command, Count, Device, device_of
from lightning_tex.cli.tables import console, table, tell
from lightning_tex.parallel.errors import UserValueError

ShapeName = Literal["olmoe", "qwen3-30b-a3b", "mixtral"]

LEGEND = (
    "Two figures: of the forward (one that keeps what a backward needs) and of forward + backward; one: of both. "
    "TFLOP/s: of the router's and experts' products, three forwards in forward + backward; what recomputation repeats "
    "is not counted. Peak: the most held at once above what is there between steps; kept: between forward and "
    "backward, beside the layer's input and output. Launches: kernels, copies and fills on CUDA, elsewhere operations "
    "that are no views. Waits: of the host for the device. Off: of the output from ours, relative 2-norm."
)


@dataclass(frozen=True)
class LayerOptions:
    """What is measured.

    Args:
        shapes: published layers; left out: all, or none with --dim.
        dim: model width of a layer of one's own.
        hidden: width of one of its experts.
        experts: of them.
        top_k: choices of a token.
        divide: published widths by this; left out: 1 on CUDA, 8 elsewhere.
        tokens: of a pass; left out: 16384 on CUDA, 1024 elsewhere.
        routing: how tokens choose: equally many on all experts, or by Zipf's law.
        exponent: of Zipf's law.
        dtype: of parameters and tokens.
        recomputation: whether the forward runs again in the backward.
        capacity_factor: of our layer; left out: dropless.
        new_gradients: every backward makes gradients anew, in place of adding to those that are there.
        only: layers of others to compare with, by the names in the table; left out: all that are installed.
        alone: compare with none.
        turns: of which medians are taken.
        repeat: passes of each layer that are timed in a turn.
        seconds: after which no further combination of these is begun; left out: all are.
        threads: of torch, on CPU.
        device: where; left out: cuda if torch sees one.
    """

    shapes: list[ShapeName] | None = None
    dim: Count | None = None
    hidden: Count | None = None
    experts: Count | None = None
    top_k: Count = Count(2)
    divide: Count | None = None
    tokens: Count | None = None
    routing: list[Routing] = field(default_factory=lambda: ["balanced", "zipf"])
    exponent: PositiveFloat = 1.0
    dtype: list[Literal["float32", "bfloat16"]] = field(default_factory=lambda: ["bfloat16"])
    recomputation: list[bool] = field(default_factory=lambda: [False])
    capacity_factor: PositiveFloat | None = None
    new_gradients: bool = False
    only: list[str] | None = None
    alone: bool = False
    turns: Count = Count(5)
    repeat: Count = Count(3)
    seconds: PositiveFloat | None = None
    threads: Count = Count(1)
    device: Device | None = None


def bench_layer(options: LayerOptions) -> dict[str, Any]:
    """Run one MoE layer alone, forward and backward, and show its speed, share of the device's peak, memory, launches
    and waits, beside a plain loop over experts and the layers of other projects that are installed.
    """
    if unknown := set(options.only or ()) - set(PEERS):
        raise UserValueError(f"--only {sorted(unknown)}; legal: {list(PEERS)}")
    device = device_of(options.device)
    torch.set_num_threads(options.threads)
    cuda = device.type == "cuda"
    plan = layer.Plan(
        _shapes(options, 1 if cuda else 8),
        options.routing,
        [getattr(torch, dtype) for dtype in options.dtype],
        options.recomputation,
        options.tokens or (16384 if cuda else 1024),
        device,
        options.exponent,
        options.capacity_factor,
        options.turns,
        options.repeat,
        options.new_gradients,
        [] if options.alone else options.only,
        options.seconds,
    )
    report: dict[str, Any] = {**layer.conditions(plan), "cases": []}
    tell(
        "{device}, torch {torch}; medians of {turns} turns of {repeat} passes; gradients: {gradients}".format(**report)
    )
    for case in layer.cases(plan):
        report["cases"].append(case)
        show(case)
    tell(LEGEND)
    wanted = len(plan.shapes) * len(plan.routings) * len(plan.dtypes) * len(plan.recomputations)
    report["left_out"] = wanted - len(report["cases"])
    if report["left_out"]:
        tell(f"{report['left_out']} of {wanted} combinations were left out after {options.seconds:g} s")
    return report


def _shapes(options: LayerOptions, divide: int) -> list[Shape]:
    """Those that are asked for."""
    own = [options.dim, options.hidden, options.experts]
    if any(own):
        if not all(own):
            raise UserValueError("a layer of one's own needs --dim, --hidden and --experts")
        assert options.dim and options.hidden and options.experts
        named = [SHAPES[name] for name in options.shapes or ()]
        return [*named, Shape("own", options.dim, options.hidden, options.experts, options.top_k)]
    divide = options.divide or divide
    return [_divided(SHAPES[name], divide) for name in options.shapes or SHAPES]


def _divided(shape: Shape, by: int) -> Shape:
    if by == 1:
        return shape
    return replace(shape, name=f"{shape.name} / {by}", dim=shape.dim // by, hidden=shape.hidden // by)


def show(case: dict[str, Any]) -> None:
    """Print a case of the layer bench."""
    what = (
        f"{case['shape']}: D {case['dim']}, H {case['hidden']}, {case['experts']} experts, top-{case['top_k']}; "
        f"{case['tokens']} tokens, {case['dtype']}, {case['routing']} (largest load {case['largest_load']:.2f} of the "
        f"mean){', recomputed' if case['recomputed'] else ''}; peak: {case['peak']['flops_per_second'] / 1e12:.4g} "
        f"TFLOP/s, {case['peak']['of']}"
    )
    headings = ("ms", "to ours", "ktok/s", "TFLOP/s", "of peak, %")
    counts = ("peak MB", "kept MB", "launches", "waits", "off")
    shown = table("", *headings, *counts, left=[""])
    for name, row in case["layers"].items():
        shown.add_row(name, *_cells(row))
    console().print(what)
    console().print(shown)
    for name, reason in case["skipped"].items():
        tell(f"skipped: {name}: {reason}")


def _cells(row: dict[str, Any]) -> list[str]:
    waits = row["synchronisations"]
    return [
        f"{row['forward_ms']:.2f}, {row['both_ms']:.2f}",
        f"{row['to_ours'][1]:.2f}",
        f"{row['tokens_per_second'][1] / 1e3:.1f}",
        ", ".join(f"{rate / 1e12:.3g}" for rate in row["flops_per_second"]),
        ", ".join(f"{100 * share:.0f}" for share in row["share_of_peak"]),
        f"{row['peak_bytes'] / 1e6:.0f}",
        f"{row['kept_bytes'] / 1e6:.0f}",
        "+".join(map(str, row["launches"])),
        "" if waits is None else "+".join(map(str, waits)),
        f"{row['difference']:.0e}" if row["difference"] else "",
    ]


LAYER = Command("bench layer", bench_layer, (LayerOptions,))
