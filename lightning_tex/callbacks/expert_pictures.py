"""Pictures of where tokens go: layer x expert, and every layer's experts over the steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_tex.callbacks.expert_history import ExpertHistory
from lightning_tex.callbacks.heat_maps import colour_bar, heat_map, new_figure, spaced

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Layers that are drawn over the steps; of more, evenly spaced ones.
_MOST_LAYERS = 12
_GRID_COLUMNS = 4


def load_figure(history: ExpertHistory) -> Figure:
    """Draw a history: on the left the last column by layer and expert, on the right experts by step for each layer."""
    from matplotlib.ticker import MaxNLocator

    layers = history.layers
    shown = [layers[i] for i in spaced(len(layers), _MOST_LAYERS)]
    columns = min(_GRID_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure = new_figure(4.6 + 2.3 * columns, max(3.2, 1.0 + 1.9 * rows))
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[4.6, 2.3 * columns])[0]
    now = left.subplots()
    width = max(history.choices(layer).shape[1] for layer in layers)
    last = torch.full((len(layers), width), torch.nan)
    for row, layer in enumerate(layers):
        of_layer = history.loads(layer)[-1]
        last[row, : len(of_layer)] = of_layer
    image = heat_map(now, last, extent=(-0.5, width - 0.5, len(layers) - 0.5, -0.5))
    now.xaxis.set_major_locator(MaxNLocator(integer=True))
    now.set(xlabel="expert", ylabel="layer", title=f"load up to step {history.steps[-1]:,}")
    if len(layers) <= 16:
        now.set_yticks(range(len(layers)), layers)
    colour_bar(left, image, now, "choices of an expert, relative to the mean")
    grid = right.subplots(rows, columns, squeeze=False)
    for ax, layer in zip(grid.flat, shown, strict=False):
        loads = history.loads(layer)
        heat_map(ax, loads.T, extent=(*_span(history.steps), loads.shape[1] - 0.5, -0.5))
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_title(f"layer {layer}", fontsize="small")
        ax.tick_params(labelsize="x-small")
    for ax in list(grid.flat)[len(shown) :]:
        ax.set_axis_off()
    right.supxlabel("step", fontsize="medium")
    right.supylabel("expert", fontsize="medium")
    return figure


def _span(ends: list[int]) -> tuple[int, int]:
    """Steps from the begin of the first column to the end of the last one."""
    first = ends[0] if len(ends) == 1 else ends[1] - ends[0]
    return max(0, ends[0] - first), ends[-1]
