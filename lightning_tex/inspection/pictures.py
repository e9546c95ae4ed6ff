"""Pictures of what experts do: loads, specialisation by source and document, typical tokens, and experts together."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_tex.callbacks.heat_maps import colour_bar, heat_map, new_figure, save, spaced
from lightning_tex.inspection.measures import lift

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LAYERS = 4  # side by side; of more, evenly spaced ones
_TOKEN_LAYERS = 3  # that have a picture of tokens
_EXPERTS, _COLUMNS, _TOKENS = 12, 4, 10  # of such a picture

Layer = Mapping[str, Any]


def draw(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what there is to draw of :meth:`~lightning_tex.inspection.UsageReport.plain` into a folder; the files."""
    layers = report["layers"]
    drawn = {"load": loads(layers)}
    shown = [layers[i] for i in spaced(len(layers), _LAYERS)]
    if len(report["sources"]) > 1:
        drawn["sources"] = specialisation(shown, "by_source", report["sources"], "choices of a source's tokens")
    if len(report["documents"]) > 1:
        names = [one["name"] for one in report["documents"]]
        drawn["documents"] = specialisation(shown, "by_document", names, "choices of a document's tokens")
    with_tokens = [layer for layer in layers if any(expert["typical"] for expert in layer["experts"])]
    for layer in (with_tokens[i] for i in spaced(len(with_tokens), _TOKEN_LAYERS)):
        drawn[f"tokens-{layer['layer']}"] = tokens(layer)
    if any(layer["top_k"] > 1 for layer in layers):
        drawn["together"] = pairs(shown, "together")
    following = [layer for layer in layers[1:] if layer["paths"]]
    if following:
        drawn["paths"] = pairs([following[i] for i in spaced(len(following), _LAYERS)], "paths")
    files = []
    for name, figure in drawn.items():
        files.append(folder / f"{name}.png")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            save(figure, files[-1])
    return files


def loads(layers: Sequence[Layer]) -> Figure:
    """Loads by layer and expert, and how much a token or document tells of its expert."""
    kinds = ("told_by_token", "told_by_source", "told_by_document")
    told = {
        kind: [layer[kind] for layer in layers] for kind in kinds if any(layer[kind] is not None for layer in layers)
    }
    width = max(layer["num_experts"] for layer in layers)
    figure = new_figure(4.2 + 0.06 * min(width, 64) + 3.0 * bool(told), max(2.6, 1.3 + 0.26 * len(layers)))
    left, right = figure.subplots(1, 2, squeeze=False, width_ratios=[3, 2])[0] if told else (figure.subplots(), None)
    table = torch.full((len(layers), width), torch.nan)
    for row, layer in enumerate(layers):
        choices = torch.tensor(layer["choices"], dtype=torch.float64)
        table[row, : len(choices)] = choices / choices.mean().clamp(min=1e-9)
    colour_bar(figure, heat_map(left, table), left, "choices of an expert, relative to the mean")
    left.set(xlabel="expert", ylabel="layer", title="load")
    left.set_xticks(spaced(width, 16))
    names = [layer["layer"] for layer in layers]
    left.set_yticks(range(len(layers)), names)
    if right is not None:
        height = 0.8 / len(told)
        for place, (kind, values) in enumerate(told.items()):
            at = [row - 0.4 + (place + 0.5) * height for row in range(len(layers))]
            right.barh(at, values, height, label=kind.removeprefix("told_by_"))
        right.set(xlim=(0, 1), title="how much it tells of its expert", yticks=range(len(layers)), yticklabels=names)
        right.invert_yaxis()
        right.legend(fontsize="x-small", loc="lower right")
        right.spines[["top", "right"]].set_visible(False)
    return figure


def specialisation(layers: Sequence[Layer], table: str, names: Sequence[str], title: str) -> Figure:
    """Choices of sources or documents by expert, relative to those of all; rows of one expert stand together."""
    lifts = [lift(torch.tensor(layer[table])) for layer in layers]
    best = lifts[-1].argmax(1)
    order = sorted(range(len(names)), key=lambda row: (int(best[row]), -float(lifts[-1][row, best[row]])))
    widths = [max(1.0, 0.22 * min(layer["num_experts"], 32)) for layer in layers]
    figure = new_figure(max(7.0, 3.4 + sum(widths) + 0.5 * len(layers)), max(2.8, 1.6 + 0.17 * len(names)))
    panels = figure.subplots(1, len(layers), squeeze=False, sharey=True, width_ratios=widths)[0]
    _panels(figure, panels, [each[order] for each in lifts], layers, f"{title}, relative to those of all tokens")
    panels[0].set_yticks(range(len(names)), [names[row] for row in order], parse_math=False, fontsize=6)
    return figure


def tokens(layer: Layer) -> Figure:
    """Typical tokens of a layer's experts, the most used ones, and the share of each that goes to the expert."""
    order = sorted(range(layer["num_experts"]), key=lambda e: -layer["choices"][e])[:_EXPERTS]
    columns = min(_COLUMNS, len(order))
    rows = -(-len(order) // columns)
    figure = new_figure(2.4 * columns, 0.5 + 2.1 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(order) :]:
        axes.set_axis_off()
    for axes, number in zip(grid.flat, sorted(order), strict=False):
        expert = layer["experts"][number]
        shown = expert["typical"][:_TOKENS]
        axes.barh(range(len(shown)), [one["share_of_token"] for one in shown], color="#b2182b", alpha=0.45)
        for place, one in enumerate(shown):
            axes.text(
                0.02, place, printable(one["text"]), va="center", fontsize=7, family="monospace", parse_math=False
            )
        axes.set(xlim=(0, 1), ylim=(_TOKENS - 0.5, -0.5), yticks=[], xticks=[0, 0.5, 1])
        axes.tick_params(labelsize="x-small")
        axes.set_title(f"expert {number}: {expert['share']:.0%} of choices", fontsize="small")
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.supxlabel(f"layer {layer['layer']}: typical tokens; share of the token's choices", fontsize="small")
    return figure


def pairs(layers: Sequence[Layer], table: str) -> Figure:
    """Pairs of experts that a token chose, in one layer or one after the other, relative to chance."""
    lifts = []
    for layer in layers:
        numbers = torch.tensor(layer[table])
        if table == "together":
            numbers = numbers.masked_fill(torch.eye(len(numbers), dtype=torch.bool), 0)
        each = lift(numbers)
        lifts.append(each.fill_diagonal_(torch.nan) if table == "together" else each)
    figure = new_figure(max(5.0, 3.0 * len(layers) + 0.6), 3.9)
    panels = figure.subplots(1, len(layers), squeeze=False)[0]
    title = "tokens that chose both" if table == "together" else "tokens that chose one after the other"
    _panels(figure, panels, lifts, layers, f"{title}, relative to chance")
    panels[0].set_ylabel("expert" if table == "together" else "expert of the MoE layer before")
    return figure


def printable(text: str) -> str:
    """A token's text with what cannot be seen."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return shown.replace(" ", "·")


def _panels(figure: Figure, panels: Any, lifts: Sequence[Tensor], layers: Sequence[Layer], title: str) -> None:
    for axes, each, layer in zip(panels, lifts, layers, strict=True):
        image = heat_map(axes, each)
        axes.set_title(f"layer {layer['layer']}", fontsize="small")
        axes.set_xlabel("expert")
        axes.set_xticks(spaced(each.shape[1], 9))
    colour_bar(figure, image, list(panels), title)
