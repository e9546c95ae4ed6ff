"""What every command prints and draws with: one console, tables, the JSON line, figures, stacked bars."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from lightning_tex.parallel.errors import UserValueError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NARROWEST = 130  # the widest table


@cache
def console() -> Console:
    """As wide as the terminal, and at least as the tables."""
    return Console(width=max(_NARROWEST, Console().width), highlight=False)


def tell(text: str) -> None:
    """Print a paragraph, wrapped between words."""
    console().print(text)


def tell_line(text: str) -> None:
    """Print a line that stays one, such as a path that is to be copied."""
    console().print(text, soft_wrap=True)


def table(*headings: str, title: str | None = None, left: Sequence[str] = ()) -> Table:
    """An empty table whose columns are aligned to the right.

    Args:
        headings: of the columns.
        title: above it.
        left: headings of columns that are aligned to the left.
    """
    made = Table(box=SIMPLE, padding=(0, 1), title=title, title_justify="left")
    for heading in headings:
        made.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    return made


def print_json(report: Mapping[str, Any]) -> None:
    """The last line of a command with ``--json``: one object."""
    print(json.dumps(report), flush=True)


def require_matplotlib(plot: Path | None) -> None:
    """Refuse to draw before anything is measured, where nothing can be drawn.

    Raises:
        UserValueError: there is no matplotlib.
    """
    if plot is not None and find_spec("matplotlib") is None:
        raise UserValueError("--plot needs matplotlib; legal: pip install matplotlib, or no --plot")


def figure(width: float, height: float) -> Figure:
    """An empty figure, of inches, that needs no display. Imports matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def save(drawn: Figure, path: Path, dpi: int = 120) -> None:
    """Write a figure, in the format that the file's name says."""
    drawn.savefig(path, dpi=dpi)


def parts_in(rows: Iterable[Mapping[str, float]]) -> list[str]:
    """The parts that some row has any of, in their order."""
    return list(dict.fromkeys(part for row in rows for part, value in row.items() if value))


def stack(
    axes: Any, names: Sequence[str], rows: Sequence[Mapping[str, float]], parts: Sequence[str], unit: float
) -> None:
    """Horizontal stacked bars: one for each name, one colour for each part."""
    from matplotlib import colormaps

    left = [0.0] * len(names)
    for i, part in enumerate(parts):
        widths = [row.get(part, 0) / unit for row in rows]
        axes.barh(range(len(names)), widths, left=left, label=part, color=colormaps["tab20"](i % 20))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(names)), names, fontsize=7)


def seconds(time: float) -> str:
    """A time with its unit."""
    return f"{time:.3g} s" if time >= 1 else f"{1e3 * time:.3g} ms"
