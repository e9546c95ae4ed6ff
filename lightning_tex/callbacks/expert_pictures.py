"""Pictures of where tokens go: layer x expert, and every layer's experts over the steps."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_tex.callbacks.expert_history import ExpertHistory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Octaves on either side of an even load that colours tell apart.
_OCTAVES = 3
# Layers that are drawn over the steps; of more, evenly spaced ones.
_MOST_LAYERS = 12
_GRID_COLUMNS = 4


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def load_figure(history: ExpertHistory) -> Figure:
    """Draw a history: on the left the last column by layer and expert, on the right experts by step for each layer."""
    from matplotlib.figure import Figure

    layers = history.layers
    shown = [layers[i] for i in _spread(len(layers), _MOST_LAYERS)]
    columns = min(_GRID_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.6 + 2.3 * columns, max(3.2, 1.0 + 1.9 * rows)), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[4.6, 2.3 * columns])[0]
    now = left.subplots()
    width = max(history.choices(layer).shape[1] for layer in layers)
    last = torch.full((len(layers), width), torch.nan)
    for row, layer in enumerate(layers):
        of_layer = history.loads(layer)[-1]
        last[row, : len(of_layer)] = of_layer
    image = _image(now, last, extent=(-0.5, width - 0.5, len(layers) - 0.5, -0.5))
    now.set(xlabel="expert", ylabel="layer", title=f"load up to step {history.steps[-1]:,}")
    if len(layers) <= 16:
        now.set_yticks(range(len(layers)), layers)
    ticks = range(-_OCTAVES, _OCTAVES + 1)
    bar = left.colorbar(image, ax=now, location="bottom", ticks=list(ticks), shrink=0.9)
    bar.ax.set_xticklabels([f"1/{2**-tick}" if tick < 0 else str(2**tick) for tick in ticks])
    bar.set_label("choices of an expert, relative to the mean")
    grid = right.subplots(rows, columns, squeeze=False)
    for ax, layer in zip(grid.flat, shown, strict=False):
        loads = history.loads(layer)
        _image(ax, loads.T, extent=(history.steps[0], max(history.steps[-1], history.steps[0] + 1), loads.shape[1], 0))
        ax.set_title(f"layer {layer}", fontsize="small")
        ax.tick_params(labelsize="x-small")
    for ax in list(grid.flat)[len(shown) :]:
        ax.set_axis_off()
    right.supxlabel("step", fontsize="medium")
    right.supylabel("expert", fontsize="medium")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG file, whole or not at all."""
    draft = path.with_name(f".{path.name}")
    figure.savefig(draft, format="png", dpi=130)
    draft.replace(path)


def _image(ax: Any, loads: Tensor, extent: tuple[float, float, float, float]) -> Any:
    octaves = loads.log2().clamp(-_OCTAVES, _OCTAVES)
    return ax.imshow(
        octaves.numpy(), cmap="RdBu_r", vmin=-_OCTAVES, vmax=_OCTAVES, aspect="auto", interpolation="nearest",
        extent=extent,
    )  # fmt: skip


def _spread(count: int, most: int) -> list[int]:
    """At most so many of the numbers below ``count``, evenly spaced, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
