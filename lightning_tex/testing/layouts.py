"""Every legal layout of a module on a number of processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from torch import nn

from lightning_tex.moe import MoE
from lightning_tex.parallel.errors import UserError, UserValueError
from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.sharding import check_shardable
from lightning_tex.strategy import TexMoEStrategy

# Arguments of TexMoEStrategy that make a layout, by the field of Layout.
_SIZES = {
    "tensor": "tensor_parallel_size",
    "expert": "expert_parallel_size",
    "expert_tensor": "expert_tensor_parallel_size",
}
_ARGUMENTS = tuple(signature(TexMoEStrategy).parameters)


@dataclass(frozen=True)
class Run:
    """A layout to train on: processes, and what TexMoEStrategy is given.

    Args:
        devices: processes.
        strategy: arguments of :class:`lightning_tex.TexMoEStrategy`.

    Raises:
        UserValueError: it has no such argument.
    """

    devices: int
    strategy: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [name for name in self.strategy if name not in _ARGUMENTS]
        if unknown:
            raise UserValueError(f"TexMoEStrategy takes no {', '.join(unknown)}; legal: {', '.join(_ARGUMENTS)}")

    @classmethod
    def of(cls, options: Mapping[str, Any] | Run) -> Run:
        """From one mapping, such as ``{"devices": 4, "tensor_parallel_size": 2}``, or as it is.

        Raises:
            UserValueError: ``devices`` is missing, or another name is no argument of TexMoEStrategy.
        """
        if isinstance(options, Run):
            return options
        strategy = dict(options)
        if "devices" not in strategy:
            raise UserValueError(f"a layout {strategy} without devices, its number of processes; legal: 1 or more")
        return cls(int(strategy.pop("devices")), strategy)

    def resolve(self, module: nn.Module) -> Layout:
        """The layout on this module.

        Raises:
            ValueError: it is not legal, naming the option and what is.
        """
        names = (*_SIZES.values(), "duplicate_token_dropping")
        sizes = {name: self.strategy[name] for name in names if name in self.strategy}
        layout = Layout.resolve(self.devices, **sizes, num_experts=num_experts(module))
        check_shardable(module, layout)
        return layout

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.strategy.items())
        return f"devices={self.devices}" + (f", {options}" if options else "")


def num_experts(module: nn.Module) -> list[int]:
    """Experts of each MoE layer."""
    return [layer.num_experts for layer in module.modules() if isinstance(layer, MoE)]


def legal_layouts(module: nn.Module, devices: Iterable[int] = (1, 2, 4), **strategy: Any) -> list[Run]:
    """Every layout that a module's layers allow on these numbers of processes.

    Args:
        module: a module that is not sharded; its parameters may be on the meta device.
        devices: numbers of processes.
        strategy: further arguments of TexMoEStrategy, the same in all.
    """
    runs: dict[Layout, Run] = {}
    experts = num_experts(module)
    for world in devices:
        for tensor in (size for size in range(1, world + 1) if world % size == 0):
            for expert_tensor in dict.fromkeys((tensor, 1)):
                sizes = Layout.legal_expert_sizes(world, expert_tensor, experts) if experts else [1]
                for expert in sizes:
                    layout = Layout(world, tensor, expert, expert_tensor)
                    run = Run(world, {**{_SIZES[name]: getattr(layout, name) for name in _SIZES}, **strategy})
                    try:
                        if not experts and expert_tensor != tensor:
                            continue  # folding has no meaning without experts
                        runs.setdefault(run.resolve(module), run)
                    except UserError:
                        continue
    return list(runs.values())
