"""Optimizer steps over the same elements: the tiled one and torch's own.

Everything the benchmark knows of :class:`TiledOptimizer` is here. A contestant of another project is one more
:class:`Candidate`, as in ``benchmarks/optimizer_step``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tex.layers import ParallelAttention
from lightning_tex.moe import MoE
from lightning_tex.optim import OptimizerStateConfig, TiledOptimizer
from lightning_tex.optim.flat_sizes import UNBOUNDED
from lightning_tex.optim.shard import TiledShard
from lightning_tex.optim.state_config import OptimizerStateFormat
from lightning_tex.parallel.sharding import check_shardable, parameter_shardings, shard_module
from lightning_tex.parallel.topology import Topology

OptimizerName = Literal["AdamW", "Adam", "SGD", "Adagrad"]
OPTIMIZERS: dict[OptimizerName, dict[str, Any]] = {
    "AdamW": {"lr": 1e-4},
    "Adam": {"lr": 1e-4},
    "SGD": {"lr": 1e-4, "momentum": 0.9},
    "Adagrad": {"lr": 1e-4},
}


@dataclass(frozen=True)
class Workload:
    """What is stepped.

    Args:
        elements: parameters of a rank, in one dense tensor; or ``None``: those of a transformer block with experts.
        experts: number of experts of that block, which is attention (4 width^2) and experts (8 width^2 each).
        width: model width of the block.
        dtype: of parameters and gradients.
        device: where they are.
        optimizer: name of a torch optimizer, of :data:`OPTIMIZERS`.
        topology: the layout, of which this process is a rank.
    """

    elements: int | None
    experts: int | None
    width: int
    dtype: torch.dtype
    device: torch.device
    optimizer: OptimizerName
    topology: Topology

    def module(self) -> nn.Module:
        """A rank's parameters, sharded for the layout, without values."""
        module: nn.Module
        with torch.device("meta"):
            if self.experts is None:
                assert self.elements is not None
                module = nn.ParameterList([torch.empty(self.elements)])
            else:
                heads = self.topology.layout.tensor  # as many as can be sharded; they change no size
                attention = ParallelAttention(self.width, heads)
                module = nn.ModuleList([attention, MoE(self.width, 4 * self.width, self.experts)])
        check_shardable(module, self.topology.layout)
        shard_module(module, self.topology)
        return module.to(self.dtype)

    def count(self) -> int:
        """Parameters of this rank."""
        return sum(parameter.numel() for parameter in self.module().parameters())

    def drawn(self, *shape: int) -> Tensor:
        """Numbers of a gradient's size, repeating after 1M: to draw 10^9 takes longer than to step them."""
        generator = torch.Generator(self.device).manual_seed(0)
        flat = torch.empty(math.prod(shape), dtype=self.dtype, device=self.device)
        first, *others = flat.split(1 << 20)
        first.normal_(0, 1e-2, generator=generator)
        for other in others:
            other.copy_(first[: len(other)])
        return flat.view(shape)

    def build(self, parameters: Sequence[nn.Parameter], **options: Any) -> Optimizer:
        """The torch optimizer over some parameters."""
        return getattr(torch.optim, self.optimizer)(parameters, **OPTIMIZERS[self.optimizer], **options)

    @property
    def low_precision(self) -> bool:
        """Whether parameters have fewer bits than an optimizer needs."""
        return self.dtype.itemsize < 4


class Candidate:
    """One way to step a workload's elements, on tensors of its own.

    Args:
        workload: the elements.

    Attributes:
        has_master: whether parameters are only written, the values that are updated being kept elsewhere.
    """

    has_master = False

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def prepare(self) -> None:
        """Put gradients where a backward would; neither timed nor counted."""

    def step(self) -> None:
        """One step, from gradients to parameters; collective over the layout's ranks."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of what outlives this object."""


class Tiled(Candidate):
    """This package's step.

    Args:
        workload: the elements.
        tile_size: elements in a tile; ``None``: the default.
        optimizer_state_format: how states are kept.
        max_skipped_steps: look for infinities and NaN first, as the strategy does by default; that takes the norm.
        clipped: clip by a norm that gradients exceed.
    """

    def __init__(
        self,
        workload: Workload,
        tile_size: int | None,
        optimizer_state_format: OptimizerStateFormat = "fp32",
        max_skipped_steps: int | None = None,
        clipped: bool = False,
    ) -> None:
        super().__init__(workload)
        self.clipped = clipped
        module = workload.module().to_empty(device=workload.device)
        named = dict(module.named_parameters())
        for parameter in named.values():
            parameter.data.copy_(workload.drawn(*parameter.shape))
        places = {named[name]: place for name, place in parameter_shardings(module, workload.topology).items()}
        inner = workload.build(list(named.values()))
        state_config = OptimizerStateConfig(
            optimizer_state_format=optimizer_state_format, tile_size=tile_size, max_skipped_steps=max_skipped_steps
        )
        self.optimizer = TiledOptimizer(inner, places, workload.topology.world, state_config)
        self.parameters = list(named.values())
        self._draw()
        self.has_master = workload.low_precision and optimizer_state_format == "fp32"

    @property
    def tile_size(self) -> int:
        """Elements in the largest tile."""
        tiled = (shard for shard in self.optimizer.shards if isinstance(shard, TiledShard))
        spans = (span for shard in tiled for span in shard.states.spans)
        return max(span.stop - span.start for span in spans)

    def _draw(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter.grad.copy_(self.workload.drawn(*parameter.shape))

    def prepare(self) -> None:
        if self.clipped:  # which uses them up
            self._draw()

    def step(self) -> None:
        if self.clipped:
            self.optimizer.clip_by_norm(1e-3)
        self.optimizer.step()

    def close(self) -> None:
        self.optimizer.release()  # parameters know its hooks, and so each would keep the other


class Flat(Candidate):
    """A torch optimizer over one flat tensor, as in classic mixed precision where that is bf16.

    Gradients are upcast as a whole, an fp32 master is updated, parameters are downcast. No state is sharded: ranks
    average their gradients and update everything.

    Args:
        workload: the elements.
        master: whether a bf16 parameter has an fp32 master; otherwise the optimizer works on bf16.
        options: the optimizer's, such as ``fused=True``.
    """

    def __init__(self, workload: Workload, master: bool = True, **options: Any) -> None:
        super().__init__(workload)
        self.parameter = nn.Parameter(workload.drawn(workload.count()))
        self.gradient = workload.drawn(workload.count())
        self.has_master = master and workload.low_precision
        self.stepped = nn.Parameter(self.parameter.detach().float()) if self.has_master else self.parameter
        self.optimizer = workload.build([self.stepped], **options)

    def step(self) -> None:
        average(self.gradient, self.workload.topology)
        self.stepped.grad = self.gradient.float() if self.has_master else self.gradient
        self.optimizer.step()
        self.stepped.grad = None
        if self.has_master:
            self.parameter.data.copy_(self.stepped.data)


def average(gradient: Tensor, topology: Topology) -> None:
    """Average a gradient over the data axis, in place; collective."""
    if topology.data.size > 1:
        dist.all_reduce(gradient, group=topology.data.group)
        gradient.div_(topology.data.size)


Build = Callable[[Workload], Candidate]
REFERENCE = "torch fused"
FP32 = "torch fused, fp32 parameters"  # what plain mixed precision steps, which autocasts them


def _in_fp32(workload: Workload, **options: Any) -> Flat:
    return Flat(replace(workload, dtype=torch.float32), **options)


def ours(tile_size: int | None, state_formats: Sequence[OptimizerStateFormat]) -> dict[str, Build]:
    """This package's step by name: tiled, once for each state format, with the check of gradients, with clipping too,
    and in one tile.

    Args:
        tile_size: elements in a tile; ``None``: the default.
        state_formats: which of :data:`OPTIMIZER_STATE_FORMATS`.
    """
    found: dict[str, Build] = {}
    for name in state_formats:
        found["tiled" if name == "fp32" else f"tiled, {name}"] = partial(
            Tiled, tile_size=tile_size, optimizer_state_format=name
        )
    found["tiled, checked"] = partial(Tiled, tile_size=tile_size, max_skipped_steps=1)
    found["tiled, checked, clipped"] = partial(Tiled, tile_size=tile_size, max_skipped_steps=1, clipped=True)
    return found | {"untiled": partial(Tiled, tile_size=UNBOUNDED)}


def torchs(low_precision: bool) -> dict[str, Build]:
    """torch's implementations by name.

    Args:
        low_precision: whether parameters have fewer than 32 bits, so that they may have a master or not.
    """
    found: dict[str, Build] = {REFERENCE: partial(Flat, fused=True), "torch foreach": partial(Flat, foreach=True)}
    if low_precision:
        found["torch fused, no master"] = partial(Flat, master=False, fused=True)
        found[FP32] = partial(_in_fp32, fused=True)
    return found | {"torch loop": partial(Flat, foreach=False, fused=False)}
