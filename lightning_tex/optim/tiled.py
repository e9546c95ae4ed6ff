"""The sharded (ZeRO-1), tiled optimizer that the strategy puts in the place of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tex import collectives
from lightning_tex.optim.engine import Engine, fastest, require_elementwise
from lightning_tex.optim.flat import ALIGNMENT, FlatBuffer, kind
from lightning_tex.optim.overlap import Overlap
from lightning_tex.placement import Placement
from lightning_tex.stream import reached, reached_directly
from lightning_tex.topology import Axis, Communication

DEFAULT_TILE_SIZE = 1 << 23
# Elements of a buffer. Gradients are reduced buffer by buffer: several, to begin early; not too small, to be fast.
BUCKETS, SMALLEST_BUCKET, LARGEST_BUCKET = 8, 1 << 18, 1 << 24


class Shard:
    """This rank's part of one buffer: its master, and the windows (tiles) that a step walks.

    The master is the parameters' own part where they are fp32 or fp64, else an fp32 copy. Tiles are persistent views
    of it, because torch keys optimizer state by tensor.

    Args:
        buffer: the buffer.
        group: the optimizer group it belongs to; its options are read at every step.
        tile_size: elements in a tile, a multiple of 64.
    """

    def __init__(self, buffer: FlatBuffer, group: dict[str, Any], tile_size: int) -> None:
        self.buffer, self.group = buffer, group
        self.low_precision = buffer.parameters.dtype in (torch.bfloat16, torch.float16)
        self.master = buffer.shard.float() if self.low_precision else buffer.shard
        self.tiles = [nn.Parameter(tile, requires_grad=False) for tile in self.master.split(tile_size)]
        self.tile_size = tile_size
        self._versions = self._current_versions()

    def step(self, engine: Engine, scale: float) -> None:
        """Update the own part: gradient times ``scale``, upcast, one tile at a time."""
        self.refresh()
        options = fastest(engine.optimizer, self.group)
        gradients = self.buffer.gradient_shard.split(self.tile_size)
        for tile, stored, gradient in zip(self.tiles, self.buffer.shard.split(self.tile_size), gradients, strict=True):
            gradient = gradient.to(tile.dtype)
            engine.step(tile, gradient.mul_(scale) if scale != 1 else gradient, options)
            if self.low_precision:
                stored.copy_(tile)

    def refresh(self) -> None:
        """Take up parameters that somebody else wrote since the last step (a loaded state dict, a callback)."""
        versions = self._current_versions()
        if self.low_precision and versions != self._versions:
            self.master.copy_(self.buffer.shard)
        self._versions = versions

    def keep_master(self) -> None:
        """Hold the master for newer than the parameters, whoever wrote those."""
        self._versions = self._current_versions()

    def _current_versions(self) -> list[int]:
        # Our own writes go through the buffer and do not count here.
        return [entry.parameter._version for entry in self.buffer.entries]


@dataclass
class Pending:
    """What has been done to the gradients since the last step: combined over replicas; to be scaled by this.

    An object of its own, because Lightning's wrapper forwards reads to the optimizer but keeps what is assigned.
    """

    reduced: bool = False
    scale: float = 1.0

    def clear(self) -> None:
        self.reduced, self.scale = False, 1.0


class TiledOptimizer(Optimizer):
    """An elementwise torch optimizer, with its states sharded over replicas and stepped tile by tile.

    Non-expert states are sharded over the data axis, expert states over expert_data (paper section 2). Group dicts
    are those of the user's optimizer, so schedulers and whoever reads learning rates act on what is used. A parameter
    without gradient counts as one with gradient zero.

    Args:
        optimizer: the user's optimizer over the cut model's parameters.
        placements: parameter -> placement.
        world: all ranks, over which norms are summed.
        tile_size: elements in one tile, rounded down to a multiple of 64; ``None``: 8M.
        communication: what is done to communicate less; ``None``: the defaults.

    Raises:
        ValueError: the optimizer is not elementwise, or holds a parameter that is not the model's.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        placements: dict[nn.Parameter, Placement],
        world: Axis,
        tile_size: int | None = None,
        communication: Communication | None = None,
    ) -> None:
        # Monitors and messages name an optimizer by its class: let it go by the user's.
        self.__class__ = type(type(optimizer).__name__, (TiledOptimizer,), {})
        self.inner, self.world, self.placements = optimizer, world, placements
        self.tile_size = max(ALIGNMENT, (tile_size or DEFAULT_TILE_SIZE) // ALIGNMENT * ALIGNMENT)
        self.engine = Engine(optimizer)
        self.shards: list[Shard] = []
        self.frozen: list[nn.Parameter] = []
        self.pending = Pending()
        self.communication = communication or Communication()
        self.direct: set[nn.Parameter] = set()
        self._overlap = self._new_overlap()
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups = optimizer.param_groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as ``torch.optim.Optimizer`` does, and lay its parameters out in buffers."""
        known = any(param_group is group for group in self.inner.param_groups)
        if not known:
            self.inner.add_param_group(param_group)
            param_group = self.inner.param_groups[-1]
        else:
            self.param_groups.append(param_group)
        require_elementwise(self.inner, param_group)
        kinds: dict[tuple[object, ...], list[tuple[nn.Parameter, Placement]]] = {}
        for parameter in param_group["params"]:
            placement = self.placements.get(parameter)
            if placement is None:
                raise ValueError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not a parameter of the "
                    "LightningModule; register it there, so that it is placed and saved"
                )
            if not parameter.requires_grad:
                self.frozen.append(parameter)
            else:
                kinds.setdefault(kind(parameter, placement), []).append((parameter, placement))
        for members in kinds.values():
            for bucket in _buckets(members):
                self.shards.append(Shard(FlatBuffer(bucket), param_group, self.tile_size))
        self._overlap.release()
        self._overlap = self._new_overlap()

    def _new_overlap(self) -> Overlap:
        buffers = [shard.buffer for shard in self.shards]
        return Overlap(buffers, self.world, self._counted, lambda parameter: self.placements[parameter].name)

    # --- gradients

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradient buffers. ``.grad`` stays a view of them, whatever ``set_to_none`` says."""
        for shard in self.shards:
            shard.buffer.zero_gradients()
        self.pending.clear()

    def reduce_gradients(self, whole: bool = False) -> None:
        """Combine gradients over replicas, once per step; collective.

        Args:
            whole: make every ``.grad`` the combined gradient, not only this rank's shard of it.
        """
        if not self.pending.reduced:
            self._require_frozen()
            with self._counted():
                self._overlap.start_all()
                for buffer in self._overlap.buffers:
                    buffer.finish_reduction(whole, self.direct)
            self.pending.reduced = True

    def overlapping(self) -> AbstractContextManager[None]:
        """Inside runs the step's only or last backward: gradients leave for their owners as they are completed."""
        return self._overlap.during() if self.communication.overlap else nullcontext()

    def look_at(self, loss: Tensor) -> None:
        """See which parameters a loss reaches without passing through the stream that sequence parallelism splits.

        Raises:
            RuntimeError: one that it reaches both ways.
        """
        if not self.communication.sequence_parallel or self.world.size == 1:
            return
        split = {parameter for parameter, placement in self.placements.items() if placement.parts.size > 1}
        new = split & reached_directly(loss)
        if not new <= self.direct:
            _, behind = reached(loss)
            if both := new & behind:
                raise RuntimeError(
                    f"the loss reaches {', '.join(sorted(self.placements[p].name for p in both))} both through "
                    "VocabParallelHead and past it: under sequence_parallel=True activations between embedding and "
                    "head are a rank's own part, and nothing but VocabParallelHead and MoE layers may lead from them "
                    "to the loss; legal: compute that term behind the head, or sequence_parallel=False"
                )
        self.direct |= new

    def release(self) -> None:
        """Let go of the parameters: nothing of this optimizer acts on them any more."""
        self._overlap.release()

    def _require_frozen(self) -> None:
        for parameter in self.frozen:
            if parameter.requires_grad:
                raise RuntimeError(
                    f"{self.placements[parameter].name} was frozen when training was set up and is not any more, but "
                    "the optimizer has no state for it; leave it out of the optimizer while it is frozen and add it "
                    "with optimizer.add_param_group (as Lightning's BaseFinetuning does)"
                )

    def gradient_norm(self) -> Tensor:
        """The 2-norm of all gradients, each parameter counted once, whatever the layout: an fp64 scalar; collective."""
        self.reduce_gradients()
        squares = [shard.buffer.squared_norm() for shard in self.shards]
        device = next(iter(self.placements)).device
        total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)
        with self._counted():
            return collectives.all_reduce(total, self.world).sqrt() * self.pending.scale

    def clip_by_norm(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their norm is at most ``max_norm``. Returns the norm before; collective."""
        norm = self.gradient_norm()
        self.pending.scale *= min(1.0, max_norm / (float(norm) + 1e-6))
        return norm

    def clip_by_value(self, max_value: float) -> None:
        """Clamp every gradient element to [-max_value, max_value]."""
        self.reduce_gradients()
        for shard in self.shards:
            limit = max_value / self.pending.scale
            shard.buffer.gradient_shard.clamp_(-limit, limit)

    def _counted(self) -> AbstractContextManager[None]:
        """What is sent inside counts as the optimizer's."""
        return nullcontext() if self.world.meter is None else self.world.meter.optimizer_pass()

    # --- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Combine gradients if that has not happened, update the own shards, gather the parameters; collective."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self.reduce_gradients()
        under_way = []
        for shard in self.shards:
            shard.step(self.engine, self.pending.scale)
            with self._counted():
                under_way.append(shard.buffer.gather_parameters())
        for gathering in under_way:
            gathering.wait()
        self.pending.clear()
        # Schedulers look here, to warn about being stepped before the optimizer.
        self.inner._opt_called = self._opt_called = True  # type: ignore[attr-defined]
        return result

    def refresh(self) -> None:
        """Take up parameters that were written from outside since the last step."""
        for shard in self.shards:
            shard.refresh()

    def keep_masters(self) -> None:
        """Hold the own shards' fp32 values for newer than the parameters; collective."""
        for shard in self.shards:
            shard.keep_master()
            if not shard.low_precision:
                shard.buffer.gather_parameters().wait()

    # --- state, in pieces

    def pieces(self) -> Iterator[Piece]:
        """Every piece of every parameter that this rank's tiles hold."""
        for shard in self.shards:
            starts = range(shard.buffer.shard_start, shard.buffer.shard_start + len(shard.master), shard.tile_size)
            for tile, tile_start in zip(shard.tiles, starts, strict=True):
                for entry in shard.buffer.entries:
                    start, stop = max(entry.start, tile_start), min(entry.stop, tile_start + len(tile))
                    if start < stop:
                        within = (start - entry.start, stop - entry.start)
                        own = slice(start - tile_start, stop - tile_start)
                        yield Piece(entry.placement, entry.parameter, *within, tile, own)


# Schedulers are told of our step as they are of one they wrapped themselves.
TiledOptimizer.step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def _buckets(members: list[tuple[nn.Parameter, Placement]]) -> Iterator[list[tuple[nn.Parameter, Placement]]]:
    """Consecutive parameters, as many as make up a bucket; all in one where there is nothing to communicate."""
    limit = sum(parameter.numel() for parameter, _ in members) // BUCKETS
    limit = min(max(limit, SMALLEST_BUCKET), LARGEST_BUCKET)
    if members[0][1].replicas.size == 1:
        yield members
        return
    bucket: list[tuple[nn.Parameter, Placement]] = []
    size = 0
    for member in members:
        if bucket and size + member[0].numel() > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append(member)
        size += member[0].numel()
    yield bucket


class Piece(NamedTuple):
    """Elements ``start`` to ``stop`` of a parameter's stored, flattened part, held as ``tile[own]``."""

    placement: Placement
    parameter: nn.Parameter
    start: int
    stop: int
    tile: nn.Parameter
    own: slice


def parameter_names(groups: Iterable[dict[str, Any]], placements: dict[nn.Parameter, Placement]) -> list[list[str]]:
    """Names of each group's parameters, in their order."""
    return [[placements[p].name for p in group["params"]] for group in groups]
