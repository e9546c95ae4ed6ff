"""Fabric's precision plugins, and those of ours that do the same on the train step."""

from __future__ import annotations

from lightning.fabric.plugins import DoublePrecision, HalfPrecision, MixedPrecision
from lightning.fabric.plugins import Precision as FabricPrecision

from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.precision import PRECISIONS
from lightning_tex.strategy.precision import TexDoublePrecision, TexHalfPrecision, TexMixedPrecision, TexPrecision
from lightning_tex.strategy.train_step import TrainStep


def tex_precision(plugin: FabricPrecision) -> TrainStep:
    """The plugin of ours that does what Fabric's would, on the train step.

    Raises:
        ValueError: a precision that is not supported, by name.
    """
    if isinstance(plugin, TrainStep):
        return plugin
    if type(plugin) is FabricPrecision:
        return TexPrecision()
    if type(plugin) is DoublePrecision:
        return TexDoublePrecision()
    if type(plugin) is MixedPrecision:
        return TexMixedPrecision(plugin.precision, plugin.device, plugin.scaler)  # type: ignore[arg-type]
    if type(plugin) is HalfPrecision:
        return TexHalfPrecision(plugin.precision)
    raise UserValueError(
        f"precision={getattr(plugin, 'precision', type(plugin).__name__)!r} is not supported by TexMoEStrategy; legal: "
        f"{', '.join(map(repr, PRECISIONS))}"
    )
