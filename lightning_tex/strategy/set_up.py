"""From a model and its optimizers to sharded ones: what every strategy of ours does before a training begins."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tex.moe import MoE
from lightning_tex.optim import OptimizerStateConfig, RunBuffers, TiledOptimizer, require_sharable
from lightning_tex.optim.rounding import RoundingSeed
from lightning_tex.parallel import initialization
from lightning_tex.parallel.flight_record import name_layers
from lightning_tex.parallel.sharding import TexModule, parameter_shardings, shard_module, synchronise
from lightning_tex.parallel.topology import Topology
from lightning_tex.saving.plain import states_in_torch_form
from lightning_tex.strategy.random_state import shared_seed


def experts_of_layers(model: nn.Module | None) -> list[int]:
    """How many experts each MoE layer of a model has."""
    modules = [] if model is None else model.modules()
    return [module.num_experts for module in modules if isinstance(module, MoE)]


def shard_model(
    model: nn.Module,
    topology: Topology,
    device: torch.device,
    convert: Callable[[nn.Module], Any],
    recompute: Callable[[nn.Module], Any],
    given: Callable[[], Collection[str]] = tuple,
) -> tuple[nn.Module, int]:
    """Give every rank its part of a model, in place, with memory and values; collective.

    Args:
        model: whole, or on the meta device; checked to be shardable.
        topology: what it is sharded by.
        device: where it goes.
        convert: stores it in the precision's dtypes.
        recompute: wraps the blocks whose activations are not kept.
        given: names of parameters whose values will come from elsewhere.

    Returns:
        the model, and the seed that all ranks share.
    """
    seed = shared_seed(topology.world, device)
    synchronise(model, topology.world, device)
    shard_module(model, topology)
    recompute(model)
    name_layers((name, layer) for name, layer in model.named_modules() if isinstance(layer, TexModule))
    model = convert(model)
    _move_to_device(model, device)
    initialization.materialise(model, device, seed, given())
    return model, seed


def _move_to_device(model: nn.Module, device: torch.device) -> None:
    def move(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_meta else tensor.to(device)

    model._apply(move)


def sharded_optimizers(
    optimizers: Sequence[Optimizer],
    model: nn.Module,
    topology: Topology,
    state_config: OptimizerStateConfig,
    rounding_seed: RoundingSeed,
) -> dict[Optimizer, TiledOptimizer]:
    """What stands in the place of the user's optimizers, by these.

    Args:
        optimizers: over parameters of the model, which is sharded.
        model, topology: see :func:`shard_model`.
        state_config: what they keep, in which form and where.
        rounding_seed: of all optimizers of the run.

    Raises:
        ValueError: an optimizer, a parameter or a format that cannot be so, by name.
    """
    parameters = dict(model.named_parameters())
    require_sharable(optimizers, {one: name for name, one in parameters.items()}, state_config)
    shardings = {parameters[name]: one for name, one in parameter_shardings(model, topology).items()}
    buffers = RunBuffers(optimizers, shardings, topology.world, state_config, topology.communication)
    tiled = {
        one: TiledOptimizer(one, shardings, topology.world, None, None, rounding_seed, buffers) for one in optimizers
    }
    if topology.world.size == 1:
        for stands_in in tiled.values():
            stands_in.whole_states = states_in_torch_form(stands_in, topology)
    return tiled
