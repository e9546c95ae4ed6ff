"""Changes capacity and coefficients of MoE layers over a training."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from lightning import Callback, LightningModule, Trainer

from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.sharding import tex_modules

# Optimizer steps and what holds from there on, between two of them a straight line.
Points = Sequence[Sequence[float]]

_WITH = {
    "capacity_factor": "MoE layers that have a capacity_factor",
    "bias_update_rate": "a router that has a bias_update_rate, such as 'sigmoid'",
}


class RoutingSchedule(Callback):
    """Set the capacity factor and coefficients of all MoE layers by the optimizer step.

    Each argument is a list of (step, value): at a step its value, between two on a straight line, before the first and
    after the last what stands there; ``None``: it stays as the layer has it. It is a function of the step alone, so a
    resumed run goes on as it would have. Plans, and memory that is checked at the start, are of the layers' own
    capacity factor: give them the largest.

    Args:
        capacity_factor: of training.
        load_balance_coefficient, sequence_balance_coefficient, step_balance_coefficient: of losses of balance.
        z_loss_coefficient, entropy_coefficient: of the routing's other losses.
        bias_update_rate: of routers that have one (DeepSeek-V3 ends with 0).

    Raises:
        ValueError: nothing to change, steps that do not rise, or a value that there cannot be.
    """

    def __init__(
        self,
        capacity_factor: list[list[float]] | None = None,
        load_balance_coefficient: list[list[float]] | None = None,
        sequence_balance_coefficient: list[list[float]] | None = None,
        step_balance_coefficient: list[list[float]] | None = None,
        z_loss_coefficient: list[list[float]] | None = None,
        entropy_coefficient: list[list[float]] | None = None,
        bias_update_rate: list[list[float]] | None = None,
    ) -> None:
        given: dict[str, Points | None] = {
            "capacity_factor": capacity_factor,
            "load_balance_coefficient": load_balance_coefficient,
            "sequence_balance_coefficient": sequence_balance_coefficient,
            "step_balance_coefficient": step_balance_coefficient,
            "z_loss_coefficient": z_loss_coefficient,
            "entropy_coefficient": entropy_coefficient,
            "bias_update_rate": bias_update_rate,
        }
        self.points = {name: _checked(name, points) for name, points in given.items() if points is not None}
        if not self.points:
            raise UserValueError(f"RoutingSchedule of nothing; legal: one or more of {', '.join(given)}")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name in self.points:
            if not _owners(pl_module, name):
                legal = _WITH.get(name, "MoE layers")
                raise UserValueError(
                    f"RoutingSchedule({name}=..) without anything that has it; legal: a model with {legal}"
                )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        for name, points in self.points.items():
            value = value_at(points, trainer.global_step)
            for owner in _owners(pl_module, name):
                setattr(owner, name, value)


def value_at(points: Points, step: int) -> float:
    """The value at a step."""
    after = bisect_right([point[0] for point in points], step)
    if after in (0, len(points)):
        return points[min(after, len(points) - 1)][1]
    (start, first), (end, last) = points[after - 1], points[after]
    return first + (last - first) * (step - start) / (end - start)


def _owners(module: LightningModule, name: str) -> list[Any]:
    """What has the attribute that is changed: layers with a router, or their routers."""
    layers: list[Any] = [layer for _, layer in tex_modules(module) if hasattr(layer, "router")]
    found = layers if name != "bias_update_rate" else [layer.router for layer in layers]
    return [each for each in found if getattr(each, name, None) is not None]


def _checked(name: str, points: Points) -> Points:
    steps = [point[0] for point in points]
    if not points or any(len(point) != 2 for point in points) or steps != sorted(set(steps)) or steps[0] < 0:
        raise UserValueError(f"RoutingSchedule({name}={points}); legal: pairs of step and value, steps rising from 0")
    least = min(point[1] for point in points)
    if (least < 0 and name != "entropy_coefficient") or (least <= 0 and name == "capacity_factor"):
        raise UserValueError(
            f"RoutingSchedule({name}={points}) falls to {least}; legal: above 0, or 0 of a coefficient"
        )
    return points
