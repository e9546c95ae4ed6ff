"""What pictures of experts are made of: heat maps of numbers relative to a mean, and files that are whole."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Octaves on either side of 1 that colours tell apart.
_OCTAVES = 3


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, of inches, that needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def heat_map(axes: Any, values: Tensor, extent: tuple[float, float, float, float] | None = None) -> Any:
    """Draw numbers relative to 1: white is 1, red more, blue less. [rows, columns]

    Args:
        extent: left, right, bottom and top of the picture in the axes' units; ``None``: a unit for each number.
    """
    octaves = values.log2().clamp(-_OCTAVES, _OCTAVES)
    return axes.imshow(
        octaves.numpy(), cmap="RdBu_r", vmin=-_OCTAVES, vmax=_OCTAVES, aspect="auto", interpolation="nearest",
        extent=extent,
    )  # fmt: skip


def colour_bar(figure: Any, image: Any, axes: Any, label: str) -> None:
    """The scale of a heat map, below some axes."""
    ticks = range(-_OCTAVES, _OCTAVES + 1)
    bar = figure.colorbar(image, ax=axes, location="bottom", ticks=list(ticks), shrink=0.9)
    bar.ax.set_xticklabels([f"1/{2**-tick}" if tick < 0 else str(2**tick) for tick in ticks])
    bar.set_label(label)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG file, whole or not at all."""
    draft = path.with_name(f".{path.name}")
    figure.savefig(draft, format="png", dpi=130)
    draft.replace(path)


def spaced(count: int, most: int) -> list[int]:
    """At most so many of the numbers below ``count``, evenly spaced, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
