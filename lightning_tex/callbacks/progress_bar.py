"""The progress bar of runs from the command line: one line, however narrow the terminal."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.progress import BarColumn

# Columns of a terminal that has room for everything that Lightning shows.
_WIDE = 120
_NARROW_BAR = 10
# What stands before the values beside a narrow bar: "Epoch 12/99", the bar, "1000/2000", "123.45it/s".
_BEFORE_VALUES = 46


class OneLineProgressBar(RichProgressBar):
    """Lightning's, which in a terminal of less than 120 columns has a short bar, no times, and the values that fit."""

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        description, bar, batches, times, speed = super().configure_columns(trainer)
        if _width() >= _WIDE:
            return [description, bar, batches, times, speed]
        assert isinstance(bar, BarColumn)
        bar.bar_width = _NARROW_BAR
        return [description, bar, batches, speed]

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Logged values, losses first, as far as they fit; not the version of the logger."""
        values = super().get_metrics(trainer, pl_module)
        values.pop("v_num", None)
        width = _width()
        if width >= _WIDE:
            return values
        shown: dict[str, Any] = {}
        room = width - _BEFORE_VALUES
        for name, value in sorted(values.items(), key=lambda named: "loss" not in named[0]):
            text = f"{value:{self.theme.metrics_format}}" if isinstance(value, float) else str(value)
            room -= len(f"{name}: {text}") + len(self.theme.metrics_text_delimiter)
            if room >= 0:
                shown[name] = value
        return shown


def _width() -> int:
    return Console().width
