"""What a run is compared by: losses, gradient norms, gradients, parameters; and what plain layers were given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tex.optim import TiledOptimizer
from lightning_tex.parallel.collectives import all_gather, all_reduce
from lightning_tex.parallel.replay import recomputing
from lightning_tex.parallel.sharding import TexModule, parameter_shardings
from lightning_tex.parallel.topology import Topology
from lightning_tex.strategy import TexMoEStrategy


@dataclass
class Step:
    """One optimizer step: the loss, the norm of all gradients, and the whole gradients by parameter name."""

    loss: float = float("nan")
    gradient_norm: float = float("nan")
    gradients: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Record:
    """A whole run.

    Args:
        steps: in their order.
        parameters: whole, after the last step.
        replicas: parameters of which ranks that should hold equal copies do not, with the axis.
        widths: of each module that is no TEX layer but has parameters, the last dim of what it was given first.
    """

    steps: list[Step] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    replicas: dict[str, str] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)


class Recorder(Callback):
    """Writes a :class:`Record` while a module trains, in one process or on any layout."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self._open: Step | None = None

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        loss = loss.detach().double().clone()
        topology = _topology(trainer)
        if topology is not None:
            loss = all_reduce(loss, topology.data) / topology.data.size
        self._open = Step(loss=float(loss))

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        step = self._open or Step()
        parameters = dict(module.named_parameters())
        tiled = next((o for o in trainer.strategy.optimizers if isinstance(o, TiledOptimizer)), None)
        if tiled is None:
            _count_missing_gradients_as_zero(optimizer)
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.detach()
            for name, p in parameters.items()
            if p.requires_grad
        }
        step.gradients = whole(module, gradients, _topology(trainer))
        if tiled is None:
            squares = [gradient.double().square().sum() for gradient in step.gradients.values()]
            step.gradient_norm = float(torch.stack(squares).sum().sqrt())
        else:
            step.gradient_norm = float(tiled.gradient_norm())
        self.record.steps.append(step)
        self._open = None

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        topology = _topology(trainer)
        parameters = {name: p.detach() for name, p in module.named_parameters()}
        if topology is not None:
            self.record.replicas = _differing_replicas(module, topology)
        self.record.parameters = whole(module, parameters, topology)


def _count_missing_gradients_as_zero(optimizer: Optimizer) -> None:
    """As the tiled optimizer does: weight decay then takes parameters that were not used, but no frozen ones."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def whole(module: nn.Module, tensors: dict[str, Tensor], topology: Topology | None) -> dict[str, Tensor]:
    """Tensors shaped as the parameters of these names, whole and copied; collective on a layout."""
    if topology is None:
        return {name: tensor.clone() for name, tensor in tensors.items()}
    shardings = parameter_shardings(module, topology)
    return {name: shardings[name].gather(tensor).clone() for name, tensor in tensors.items()}


def _topology(trainer: Trainer) -> Topology | None:
    return trainer.strategy.topology if isinstance(trainer.strategy, TexMoEStrategy) else None


def _differing_replicas(module: nn.Module, topology: Topology) -> dict[str, str]:
    """Parameters of which ranks that should hold equal copies do not, with the axis of these ranks; collective."""
    parameters, shardings = dict(module.named_parameters()), parameter_shardings(module, topology)
    digests = torch.stack([_digest(parameters[name].detach()) for name in shardings])  # [parameters, 2]
    everywhere = all_gather(digests[None], 0, topology.world)
    differing: dict[str, str] = {}
    for index, (name, sharding) in enumerate(shardings.items()):
        sharded = {axis.name for axis, _ in sharding.shard_dims}
        mesh = ("expert_tensor", "expert_data") if sharding.replicas.name == "expert_data" else ("tensor", "data")
        for axis in mesh:
            copies = everywhere[list(topology.axis(axis).ranks), index]
            if axis not in sharded and not torch.allclose(copies, copies[:1].expand_as(copies), rtol=1e-9, atol=0):
                differing.setdefault(name, axis)
    return differing


def _digest(tensor: Tensor) -> Tensor:
    """Two numbers that tensors share if they are equal and, as good as never, otherwise: [2]."""
    flat = tensor.double().flatten()
    weights = torch.cos(torch.arange(len(flat), dtype=torch.float64, device=flat.device))
    return torch.stack([flat.square().sum(), (flat * weights).square().sum()])


@contextmanager
def watched(module: LightningModule, record: Record, running: list[str]) -> Iterator[None]:
    """Inside, note what plain modules are given, and in ``running`` which are being run, outermost first."""
    handles: list[Any] = []

    def enter(name: str, child: nn.Module, inputs: Any) -> None:
        if recomputing():  # which may stop inside a child, and shows nothing new
            return
        running.append(name)
        first = next((value for value in inputs if isinstance(value, Tensor) and value.dim()), None)
        if (
            first is not None
            and not isinstance(child, TexModule)
            and any(True for _ in child.parameters(recurse=False))
        ):
            record.widths.setdefault(name, first.shape[-1])

    def leave(child: nn.Module, inputs: Any, output: Any) -> None:
        if not recomputing():
            running.pop()

    for name, child in module.named_modules():
        if name:
            handles.append(child.register_forward_pre_hook(partial(enter, name)))
            handles.append(child.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
