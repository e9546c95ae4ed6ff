"""What the optimizer keeps of a rank's parameters, byte for byte: flat buffers, shards, masters, moments, tiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import NamedTuple

from lightning_tex.optim.flat_sizes import ALIGNMENT, bucketed, most_elements, part_length
from lightning_tex.parallel.precision import PRECISIONS
from lightning_tex.parallel.topology import Layout
from lightning_tex.planner.layouts import Candidate, Job
from lightning_tex.planner.model import ModelDescription

# Temporaries of a step in bytes per element, by what is kept, as a trial of fused AdamW shows them (optim/probe.py).
TEMPORARY_BYTES = {"plain": 0, "fp32": 4, "split": 8, "int8": 24 + 4 / 64, "stochastic": 20}
_SCALAR_BYTES = 4  # AdamW's step, one a tile


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
    """

    expert: bool
    partial: bool
    replicas: int
    owners: int
    part: int
    used: int
    element_bytes: int
    declared_partial: bool = False

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
        buffers: in the optimizer's order: with two groups matrices first, then vectors.
        first_members: of each buffer, the place of its first parameter among the model's: a backward reaches that one
            last.
        last_members: likewise of its last, which a backward reaches first.
        precision: the Trainer's.
        frozen_dense, frozen_expert: bytes of parameters that are not trained and in no buffer.
    """

    buffers: tuple[Buffer, ...]
    first_members: tuple[int, ...]
    last_members: tuple[int, ...]
    precision: str
    frozen_dense: int
    frozen_expert: int

    @classmethod
    def of(cls, job: Job, candidate: Candidate) -> FlatBuffers:
        """Those of a rank of a candidate; one object for all candidates that differ in other things."""
        key = candidate.layout, job.precision, candidate.zero_stage > 0, job.two_groups
        if key not in job.model.laid_out:
            job.model.laid_out[key] = cls._lay_out(job.model, *key)
        laid_out = job.model.laid_out[key]
        assert isinstance(laid_out, FlatBuffers)
        return laid_out

    @classmethod
    def _lay_out(
        cls, model: ModelDescription, layout: Layout, precision: str, sharded: bool, two_groups: bool
    ) -> FlatBuffers:
        dtypes = PRECISIONS[precision]
        frozen = {False: 0, True: 0}
        kinds: dict[tuple[object, ...], list[_Member]] = {}
        for place, (parameter, sharding) in enumerate(zip(model.parameters, model.shardings(layout), strict=True)):
            dtype = dtypes.full if parameter.full_precision else dtypes.usual
            elements, expert = prod(sharding.box.stored), parameter.kind == "expert"
            if not parameter.requires_grad:
                frozen[expert] += elements * dtype.itemsize
                continue
            vector = two_groups and len(parameter.shape) == 1
            key = vector, sharding.replicas.name, sharding.repeated, sharding.declared_partial, dtype
            partial = not parameter.shard_dims and layout.tensor > 1
            declared = sharding.declared_partial
            kinds.setdefault(key, []).append(
                _Member(elements, place, expert, partial, sharding.replicas.size, dtype.itemsize, declared)
            )
        buffers, first, last = [], [], []
        same: dict[Buffer, Buffer] = {}  # blocks repeat their buffers: one object for all
        for _, members in sorted(
            kinds.items(), key=lambda kind: bool(kind[0][0])
        ):  # the group of vectors is the second
            lengths = [member.elements for member in members]
            _, _, expert, partial, replicas, element_bytes, declared = members[0]
            owners = replicas if sharded else 1
            for span in bucketed(lengths, replicas):
                part = part_length(lengths[span], owners)
                buffer = Buffer(expert, partial, replicas, owners, part, sum(lengths[span]), element_bytes, declared)
                buffers.append(same.setdefault(buffer, buffer))
                first.append(members[span][0].place)
                last.append(members[span][-1].place)
        return cls(tuple(buffers), tuple(first), tuple(last), precision, frozen[False], frozen[True])

    @cached_property
    def distinct(self) -> Mapping[Buffer, int]:
        """How many buffers there are of each kind and size."""
        return Counter(self.buffers)


class _Member(NamedTuple):
    """A parameter on its way into a buffer; ``elements`` are those that a rank stores."""

    elements: int
    place: int
    expert: bool
    partial: bool
    replicas: int
    element_bytes: int
    declared_partial: bool


@dataclass(frozen=True)
class StateBytes:
    """Bytes that one rank keeps from step to step.

    Args:
        dense_parameters, expert_parameters: in the flat buffers, their padding included, and frozen ones.
        gradients: likewise; under ZeRO 2 the own parts in fp32.
        master: fp32 copies, or the 16 bits that ``split`` keeps beside the parameters.
        moments: the two states of Adam per element, with the scales of ``int8``.
        scalars: one number a tile.
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
    """What the tiled optimizer allocates for AdamW, exactly.

    Args:
        flat: the flat buffers.
        zero_stage, optimizer_state_format: as the strategy's.
        tile_size: elements, as the strategy's; ``None``: the device's budget over the temporaries.
        device: ``cuda`` or ``cpu``.
    """
    gradients = master = moments = scalars = 0
    for buffer, times in flat.distinct.items():
        own = buffer.part * times
        gradients += own * max(4, buffer.element_bytes) if zero_stage == 2 else buffer.bytes * times
        kept = kept_format(flat.precision, optimizer_state_format, buffer.element_bytes)
        per_master, per_moment = {
            "plain": (0, buffer.element_bytes),
            "fp32": (4, 4),
            "split": (2, 4),
            "int8": (2, 1),
            "stochastic": (0, 2),
        }[kept]
        master += per_master * own
        moments += 2 * per_moment * own
        if kept == "int8":
            moments += 2 * 4 * (own // ALIGNMENT)
        scalars += _SCALAR_BYTES * times * -(-buffer.part // tile_elements(kept, tile_size, device))
    dense = flat.frozen_dense + sum(buffer.bytes for buffer in flat.buffers if not buffer.expert)
    expert = flat.frozen_expert + sum(buffer.bytes for buffer in flat.buffers if buffer.expert)
    return StateBytes(dense, expert, gradients, master, moments, scalars)


def kept_format(precision: str, optimizer_state_format: str, element_bytes: int) -> str:
    """How states of parameters of that size are kept: by the format, or plainly where they need no master."""
    if element_bytes > 2 or (precision == "bf16-true" and optimizer_state_format == "fp32"):
        return "plain"
    return optimizer_state_format


def tile_elements(kept: str, tile_size: int | None, device: str) -> int:
    """Elements of a tile: the strategy's ``tile_size``, or as many as the budget allows; then aligned."""
    tile = tile_size or most_elements(TEMPORARY_BYTES[kept], device)
    return -(-tile // ALIGNMENT) * ALIGNMENT


def tile_bytes(
    flat: FlatBuffers, optimizer_state_format: str, tile_size: int | None = None, device: str = "cuda"
) -> int:
    """The most temporary memory of an optimizer step."""
    most = 0
    for buffer in flat.distinct:
        kept = kept_format(flat.precision, optimizer_state_format, buffer.element_bytes)
        tile = min(buffer.part, tile_elements(kept, tile_size, device))
        most = max(most, int(tile * TEMPORARY_BYTES[kept]))
    return most


def untiled_bytes(flat: FlatBuffers, per_element: float = 4) -> float:
    """Temporary memory of a step that upcasts the gradients of a rank's 16-bit shards all at once."""
    return per_element * sum(buffer.part for buffer in flat.buffers if buffer.element_bytes < 4)
