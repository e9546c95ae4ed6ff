"""What the optimizer keeps of a rank's parameters, byte for byte: flat buffers, shards, masters, moments, tiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from math import prod
from typing import NamedTuple

import torch

from lightning_tex.optim.flat_sizes import ALIGNMENT, batched, bucketed, most_elements, part_length
from lightning_tex.optim.matrices.costs import MatrixCosts
from lightning_tex.optim.matrices.ownership import Loads
from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.precision import PRECISIONS, WITHOUT_MASTERS
from lightning_tex.parallel.sharding import ParameterSharding
from lightning_tex.parallel.topology import Axis
from lightning_tex.planner.layouts import Candidate, Job
from lightning_tex.planner.matrices import MatrixBuffer, OwnedMatrices
from lightning_tex.planner.model import ModelDescription, Parameter
from lightning_tex.planner.optimizers import ADAMW, OptimizerDescription, StateCosts


@dataclass(frozen=True, slots=True)
class Buffer:
    """One flat buffer of a rank.

    Args:
        expert: its parameters are experts', replicated over expert_data; else over data.
        partial: tensor ranks hold equal copies, whose gradients are partial sums under sequence parallelism.
        declared_partial: they are partial sums without it, too.
        replicas: ranks that hold copies.
        owners: ranks that own a part each: replicas, or 1 under ZeRO 0.
        part: elements of one owner's part.
        used: elements of the buffer that are parameters'.
        element_bytes: of its parameters.
        costs: what the optimizer keeps and takes of its elements; of :class:`MatrixCosts`, of whole matrices.
        group: of the optimizer, its number.
    """

    expert: bool
    partial: bool
    replicas: int
    owners: int
    part: int
    used: int
    element_bytes: int
    costs: StateCosts | MatrixCosts
    declared_partial: bool = False
    group: int = 0

    @property
    def elements(self) -> int:
        return self.part * self.owners

    @property
    def bytes(self) -> int:
        return self.elements * self.element_bytes


@dataclass(frozen=True, eq=False)
class FlatBuffers:
    """The flat buffers of one rank, laid out once; those of all ranks are of equal sizes. Compared by identity.

    Args:
        buffers: in the optimizer's order, group by group.
        first_members: of each buffer, the place of its first parameter among the model's: a backward reaches that one
            last.
        last_members: likewise of its last, which a backward reaches first.
        precision: the Trainer's.
        frozen_dense, frozen_expert: bytes of parameters that are in no buffer.
        loose_gradients: bytes of gradients of such parameters, which are trained, but by no optimizer.
        matrices: of the buffers that are stepped as whole matrices.
    """

    buffers: tuple[Buffer, ...]
    first_members: tuple[int, ...]
    last_members: tuple[int, ...]
    precision: str
    frozen_dense: int
    frozen_expert: int
    loose_gradients: int
    matrices: OwnedMatrices

    @classmethod
    def of(cls, job: Job, candidate: Candidate) -> FlatBuffers:
        """Those of a rank of a candidate; one object for all candidates that differ in other things."""
        key = candidate.layout, job.precision, candidate.zero_stage > 0, job.optimizer
        if key not in job.model.laid_out:
            job.model.laid_out[key] = cls._lay_out(job.model, *key)
        laid_out = job.model.laid_out[key]
        assert isinstance(laid_out, FlatBuffers)
        return laid_out

    @classmethod
    def _lay_out(
        cls, model: ModelDescription, layout: Layout, precision: str, sharded: bool, optimizer: OptimizerDescription
    ) -> FlatBuffers:
        members = _members(model, layout, precision)
        buffers: list[Buffer] = []
        first: list[int] = []
        last: list[int] = []
        same: dict[Buffer, Buffer] = {}  # blocks repeat their buffers: one object for all
        shardings, matrices = model.shardings(layout), list[MatrixBuffer]()
        groups = optimizer.grouping(model)
        for number, places in enumerate(groups):
            costs, loads = optimizer.costs_of(number), Loads()
            kinds: dict[_Kind, list[int]] = {}
            for place in places:
                if model.parameters[place].requires_grad:
                    kinds.setdefault(members[place].kind, []).append(place)
            for kind, of_kind in kinds.items():
                owners = kind.replicas if sharded else 1
                lengths = [members[place].elements for place in of_kind]
                for span in bucketed(lengths, kind.replicas):
                    part = part_length(lengths[span], owners)
                    buffer = Buffer(
                        kind.expert, kind.partial, kind.replicas, owners, part, sum(lengths[span]), kind.element_bytes,
                        costs, kind.declared_partial, number,
                    )  # fmt: skip
                    buffers.append(same.setdefault(buffer, buffer))
                    if isinstance(costs, MatrixCosts):
                        inside = [shardings[place] for place in of_kind[span]]
                        shared = inside[0].replicas if sharded else Axis(inside[0].replicas.name)
                        matrices.append(MatrixBuffer.of(inside, shared, part, kind.dtype, loads, costs))
                    first.append(of_kind[span.start])
                    last.append(of_kind[span.stop - 1])
        kept = set().union(*groups)
        frozen, loose = {False: 0, True: 0}, 0
        for place, (parameter, member) in enumerate(zip(model.parameters, members, strict=True)):
            if place not in kept or not parameter.requires_grad:
                size = member.elements * member.kind.element_bytes
                frozen[member.kind.expert] += size
                loose += size * parameter.requires_grad
        owned = OwnedMatrices(layout, tuple(matrices))
        return cls(tuple(buffers), tuple(first), tuple(last), precision, frozen[False], frozen[True], loose, owned)

    @property
    def has_masters(self) -> bool:
        """Whether 16-bit matrices have fp32 masters."""
        return kept_format(self.precision, "fp32", 2) == "fp32"

    @cached_property
    def distinct(self) -> Mapping[Buffer, int]:
        """How many buffers there are of each kind and size."""
        return Counter(self.buffers)


class _Kind(NamedTuple):
    """What parameters of one buffer have in common."""

    expert: bool
    repeated: bool
    dtype: torch.dtype
    partial: bool
    replicas: int
    element_bytes: int
    declared_partial: bool


class _Member(NamedTuple):
    """A parameter on its way into a buffer; ``elements`` are those that a rank stores."""

    elements: int
    kind: _Kind


def _members(model: ModelDescription, layout: Layout, precision: str) -> list[_Member]:
    """What a rank stores of each parameter of a model."""
    dtypes = PRECISIONS[precision]
    alike: dict[tuple[object, ...], _Member] = {}  # blocks repeat their parameters

    def member(parameter: Parameter, sharding: ParameterSharding) -> _Member:
        dtype = dtypes.full if parameter.full_precision else dtypes.usual
        partial = not parameter.shard_dims and layout.tensor > 1
        expert = sharding.replicas.name == "expert_data"
        replicas, declared = sharding.replicas.size, sharding.declared_partial
        kind = _Kind(expert, sharding.repeated, dtype, partial, replicas, dtype.itemsize, declared)
        return _Member(prod(sharding.box.stored), kind)

    members = []
    for parameter, sharding in zip(model.parameters, model.shardings(layout), strict=True):
        key = parameter.shape, parameter.shard_dims, parameter.full_precision, parameter.declared_partial
        if key not in alike:
            alike[key] = member(parameter, sharding)
        members.append(alike[key])
    return members


@dataclass(frozen=True)
class StateBytes:
    """Bytes that one rank keeps from step to step.

    Args:
        dense_parameters, expert_parameters: in the flat buffers, their padding included, and frozen ones.
        gradients: likewise; under ZeRO 2 the own parts in fp32; and of what is trained by no optimizer.
        master: fp32 copies, or the 16 bits that ``split`` keeps beside the parameters.
        moments: the optimizer's states per element, with the scales of ``int8``.
        scalars: what it has one of for each tile.
    """

    dense_parameters: int
    expert_parameters: int
    gradients: int
    master: int
    moments: int
    scalars: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@lru_cache(maxsize=512)
def state_bytes(
    flat: FlatBuffers,
    zero_stage: int,
    optimizer_state_format: str,
    tile_size: int | None = None,
    device: str = "cuda",
) -> StateBytes:
    """What the optimizer allocates, exactly; of whole matrices, on the rank that has the most of them.

    Args:
        flat: the flat buffers.
        zero_stage, optimizer_state_format: as the strategy's.
        tile_size: elements, as the strategy's; ``None``: the device's budget over the temporaries.
        device: ``cuda`` or ``cpu``.
    """
    gradients = flat.loose_gradients
    master, moments, scalars, _ = flat.matrices.kept(flat.has_masters)
    for buffer, times in flat.distinct.items():
        own = buffer.part * times
        gradients += own * max(4, buffer.element_bytes) if zero_stage == 2 else buffer.bytes * times
        if isinstance(buffer.costs, MatrixCosts):
            continue
        kept = kept_format(flat.precision, optimizer_state_format, buffer.element_bytes)
        per_master, per_moment = {
            "plain": (0, buffer.element_bytes),
            "fp32": (4, 4),
            "split": (2, 4),
            "int8": (2, 1),
            "stochastic": (0, 2),
        }[kept]
        master += per_master * own
        states = buffer.costs.states
        moments += states * per_moment * own
        if kept == "int8":
            moments += states * 4 * (own // ALIGNMENT)
        scalars += (
            buffer.costs.number_bytes * times * -(-buffer.part // tile_elements(kept, tile_size, device, buffer.costs))
        )
    dense = flat.frozen_dense + sum(buffer.bytes for buffer in flat.buffers if not buffer.expert)
    expert = flat.frozen_expert + sum(buffer.bytes for buffer in flat.buffers if buffer.expert)
    return StateBytes(dense, expert, gradients, master, moments, scalars)


def kept_format(precision: str, optimizer_state_format: str, element_bytes: int) -> str:
    """How states of parameters of that size are kept: by the format, or plainly where they need no master."""
    if element_bytes > 2 or (precision in WITHOUT_MASTERS and optimizer_state_format == "fp32"):
        return "plain"
    return optimizer_state_format


def tile_elements(kept: str, tile_size: int | None, device: str, costs: StateCosts = ADAMW) -> int:
    """Elements of a tile: the strategy's ``tile_size``, or as many as the budget allows; then aligned, if need be."""
    tile = tile_size or most_elements(costs.temporaries.of(kept), device)
    return -(-tile // ALIGNMENT) * ALIGNMENT if costs.aligned or kept == "int8" else tile


def tile_bytes(
    flat: FlatBuffers,
    optimizer_state_format: str,
    tile_size: int | None = None,
    device: str = "cuda",
    zero_stage: int = 1,
) -> int:
    """The most temporary memory of an optimizer step: of its tiles or, where whole matrices travel, of these."""
    most = flat.matrices.temporaries(flat.has_masters, zero_stage, device)
    for (_, element_bytes), alike in groupby(flat.buffers, lambda buffer: (buffer.group, buffer.element_bytes)):
        buffers = list(alike)
        costs, parts = buffers[0].costs, [buffer.part for buffer in buffers]
        if isinstance(costs, MatrixCosts):
            continue
        kept = kept_format(flat.precision, optimizer_state_format, element_bytes)
        tile = tile_elements(kept, tile_size, device, costs)
        at_once = tile if max(parts) >= tile else max(sum(parts[span]) for span in batched(parts, tile))
        most = max(most, int(at_once * costs.temporaries.of(kept)))
    return most


def untiled_bytes(flat: FlatBuffers, per_element: float = 4) -> float:
    """Temporary memory of a step that upcasts the gradients of a rank's 16-bit shards all at once."""
    return per_element * sum(buffer.part for buffer in flat.buffers if buffer.element_bytes < 4)
