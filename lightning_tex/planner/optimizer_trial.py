"""A module's own optimizer: its groups from ``configure_optimizers``, and what it keeps by a trial of a few tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.core.optimizer import _configure_optimizers
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tex.optim import OptimizerStateConfig
from lightning_tex.optim.combined import stepper_of
from lightning_tex.optim.engine import Engine, fastest
from lightning_tex.optim.flat import FlatBuffer
from lightning_tex.optim.formats import StateFormat, Window, per_element
from lightning_tex.optim.matrices.costs import MatrixCosts
from lightning_tex.optim.probe import Probed, probe, try_steps
from lightning_tex.optim.rounding import Rounding, RoundingSeed
from lightning_tex.optim.stepping import AsMatrices, stepping
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.sharding import parameter_shardings
from lightning_tex.parallel.topology import Axis, Topology
from lightning_tex.planner.copies import undisturbed, without_values
from lightning_tex.planner.fake_values import Routing, ShapesOnly
from lightning_tex.planner.model import ModelDescription
from lightning_tex.planner.optimizers import Grouping, OptimizerDescription, StateCosts, Temporaries, assumed_adamw
from lightning_tex.planner.pretended_trainer import PretendedTrainer

# By how states are kept: the option, whether there is an fp32 master, and the parameters' dtype.
_KEPT: dict[str, tuple[Any, bool, torch.dtype]] = {
    "plain": ("fp32", False, torch.float32),
    "fp32": ("fp32", True, torch.bfloat16),
    "split": ("split", True, torch.bfloat16),
    "int8": ("int8", True, torch.bfloat16),
    "stochastic": ("stochastic", True, torch.bfloat16),
}


def read_optimizer(
    module: LightningModule, configure: Callable[[LightningModule], Any] | None = None
) -> OptimizerDescription:
    """The optimizer that a module configures; AdamW over all parameters, with the reason, where it cannot be asked.

    Args:
        module: on any device; left as it is.
        configure: what gives the optimizer of a copy of the module; ``None``: its ``configure_optimizers``.
    """
    try:
        with undisturbed():
            return _read(module, configure or (lambda copied: copied.configure_optimizers()))
    except Exception as error:
        said = (str(error).splitlines() or [""])[0]
        return assumed_adamw(f"configure_optimizers: {type(error).__name__}: {said}")


def _read(module: LightningModule, configure: Callable[[LightningModule], Any]) -> OptimizerDescription:
    with ShapesOnly(Routing()):
        copied = without_values(module)
        copied.trainer = PretendedTrainer(Axis("data"), 1)  # type: ignore[assignment]
        optimizers = _configure_optimizers(configure(copied))[0]
    if len(optimizers) != 1:
        raise UserValueError(f"{len(optimizers)} optimizers")
    places = {id(p): place for place, p in enumerate(copied.parameters())}
    groups = tuple(tuple(places[id(p)] for p in group["params"]) for group in optimizers[0].param_groups)
    return describe_optimizer(optimizers[0], _Groups(groups))


def describe_optimizer(optimizer: Optimizer, grouping: Grouping) -> OptimizerDescription:
    """What an optimizer keeps, by a trial of its groups' options.

    Args:
        optimizer: is not stepped.
        grouping: which of a model's parameters are in its groups.

    Raises:
        ValueError: it can be stepped neither in tiles nor as whole matrices.
    """
    costs = tuple(_costs(stepper_of(optimizer, group), group) for group in optimizer.param_groups)
    return OptimizerDescription(type(optimizer).__name__, grouping, costs)


class _Groups:
    """Groups that were read, of the model that they were read from."""

    def __init__(self, groups: tuple[tuple[int, ...], ...]) -> None:
        self.groups = groups

    def __call__(self, model: ModelDescription) -> tuple[tuple[int, ...], ...]:
        return self.groups


def _costs(optimizer: Optimizer, group: dict[str, Any]) -> StateCosts | MatrixCosts:
    made = stepping(OptimizerStateConfig(), optimizer, group, RoundingSeed())
    if isinstance(made, AsMatrices):
        return MatrixCosts(optimizer, group)
    probed, options = probe(optimizer, group), fastest(optimizer, group)
    window = Window(nn.Parameter(torch.linspace(-1, 1, 64)), {})
    with torch.no_grad():
        Engine(optimizer).step([window], [torch.ones(64)], options)
    kept = [value for value in window.state.values() if isinstance(value, Tensor)]
    states = [value for value in kept if per_element(value, window.tile)]
    numbers = sum(value.nbytes for value in kept if not per_element(value, window.tile))
    temporaries = {name: _temporaries(optimizer, group, probed, *how) for name, how in _KEPT.items()}
    return StateCosts(len(states), numbers, Temporaries(**temporaries), bool(options.get("fused")))


def _temporaries(
    optimizer: Optimizer, group: dict[str, Any], probed: Probed, form: Any, masters: bool, dtype: torch.dtype
) -> float:
    config = OptimizerStateConfig(optimizer_state_format=form, masters=masters)
    layer = nn.Linear(64, 64, bias=False, dtype=dtype)
    sharding = parameter_shardings(layer, Topology.single())["weight"]
    buffer = FlatBuffer([(parameter, sharding) for parameter in layer.parameters()])

    def trial(own: Tensor, tile_size: int) -> StateFormat:
        rounding = Rounding(RoundingSeed(), buffer.entries, buffer.own_start, own.device)
        return config.states(own, tile_size, probed, rounding)

    return try_steps(optimizer, group, buffer.parameters, trial).temporary_bytes
