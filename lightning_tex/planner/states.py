"""What the optimizer keeps of a rank's parameters, byte for byte: flat buffers, shards, masters, moments, tiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from lightning_tex.optim.flat_sizes import ALIGNMENT, bucketed, most_elements, part_length
from lightning_tex.parallel.topology import Layout
from lightning_tex.planner.layouts import Candidate, Job
from lightning_tex.planner.sizes import ELEMENT_BYTES, ModelSizes

# Temporaries of a step in bytes per element, by what is kept, as a trial of fused AdamW shows them (optim/probe.py).
TEMPORARY_BYTES = {"plain": 0, "fp32": 4, "split": 8, "int8": 24 + 4 / 64, "stochastic": 20}
_SCALAR_BYTES = 4  # AdamW's step, one a tile


@dataclass(frozen=True, slots=True)
class Buffer:
    """One flat buffer of a rank.

    Args:
        expert: its parameters are experts', replicated over expert_data; else over data.
        repeated: tensor ranks hold equal copies: norms and routers.
        replicas: ranks that hold copies.
        owners: ranks that own a part each: replicas, or 1 under ZeRO 0.
        part: elements of one owner's part.
        used: elements of the buffer that are parameters'.
        element_bytes: of its parameters.
    """

    expert: bool
    repeated: bool
    replicas: int
    owners: int
    part: int
    used: int
    element_bytes: int

    @property
    def elements(self) -> int:
        return self.part * self.owners

    @property
    def bytes(self) -> int:
        return self.elements * self.element_bytes


def buffers(job: Job, candidate: Candidate) -> tuple[Buffer, ...]:
    """The flat buffers of one rank, in the optimizer's order; those of all ranks are of equal sizes.

    With two groups, matrices come first, then vectors.
    """
    return _laid_out(job.sizes, candidate.layout, job.precision, candidate.zero_stage > 0, job.two_groups)[0]


def last_members(job: Job, candidate: Candidate) -> tuple[int, ...]:
    """Of each buffer, the place of its last parameter among the model's: a backward reaches that one first."""
    return _laid_out(job.sizes, candidate.layout, job.precision, candidate.zero_stage > 0, job.two_groups)[1]


def first_members(job: Job, candidate: Candidate) -> tuple[int, ...]:
    """Of each buffer, the place of its first parameter among the model's: a backward reaches that one last."""
    return _laid_out(job.sizes, candidate.layout, job.precision, candidate.zero_stage > 0, job.two_groups)[2]


@lru_cache(maxsize=512)
def _laid_out(
    sizes: ModelSizes, layout: Layout, precision: str, sharded: bool, two_groups: bool
) -> tuple[tuple[Buffer, ...], tuple[int, ...], tuple[int, ...]]:
    usual, full = ELEMENT_BYTES[precision]
    kinds: dict[tuple[bool, bool, bool, int], list[tuple[int, int]]] = {}
    for vectors in (False, True) if two_groups else (None,):
        for place, (parameter, elements) in enumerate(zip(sizes.parameters(), sizes.stored(layout), strict=True)):
            if vectors is None or vectors == (len(parameter.shape) == 1):
                repeated = parameter.kind == "uncut" and layout.tensor > 1
                element_bytes = full if parameter.full_precision else usual
                key = bool(vectors), parameter.kind == "expert", repeated, element_bytes
                kinds.setdefault(key, []).append((elements, place))
    found, last, first = [], [], []
    same: dict[Buffer, Buffer] = {}  # blocks repeat their buffers: one object for all
    for (_, expert, repeated, element_bytes), members in kinds.items():
        lengths = [elements for elements, _ in members]
        replicas = layout.expert_data if expert else layout.data
        owners = replicas if sharded else 1
        for span in bucketed(lengths, replicas):
            part = part_length(lengths[span], owners)
            buffer = Buffer(expert, repeated, replicas, owners, part, sum(lengths[span]), element_bytes)
            found.append(same.setdefault(buffer, buffer))
            last.append(members[span][-1][1])
            first.append(members[span][0][1])
    return tuple(found), tuple(last), tuple(first)


@lru_cache(maxsize=512)
def distinct(of: tuple[Buffer, ...]) -> Mapping[Buffer, int]:
    """How many buffers there are of each kind and size."""
    return Counter(of)


@dataclass(frozen=True)
class StateBytes:
    """Bytes that one rank keeps from step to step.

    Args:
        dense_parameters, expert_parameters: in the flat buffers, their padding included.
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


def state_bytes(job: Job, candidate: Candidate, tile_size: int | None = None, device: str = "cuda") -> StateBytes:
    """What the tiled optimizer allocates for AdamW, exactly.

    Args:
        job, candidate: what is trained, and how.
        tile_size: elements, as the strategy's; ``None``: the device's budget over the temporaries.
        device: ``cuda`` or ``cpu``.
    """
    return _state_bytes(buffers(job, candidate), job.precision, candidate.zero_stage, candidate.optimizer_state_format,
                        tile_size, device)  # fmt: skip


@lru_cache(maxsize=512)
def _state_bytes(
    of: tuple[Buffer, ...],
    precision: str,
    zero_stage: int,
    optimizer_state_format: str,
    tile_size: int | None,
    device: str,
) -> StateBytes:
    gradients = master = moments = scalars = 0
    for buffer, times in distinct(of).items():
        own = buffer.part * times
        gradients += own * max(4, buffer.element_bytes) if zero_stage == 2 else buffer.bytes * times
        kept = kept_format(precision, optimizer_state_format, buffer.element_bytes)
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
    dense = sum(buffer.bytes for buffer in of if not buffer.expert)
    expert = sum(buffer.bytes for buffer in of if buffer.expert)
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


def tile_bytes(job: Job, candidate: Candidate, tile_size: int | None = None, device: str = "cuda") -> int:
    """The most temporary memory of an optimizer step."""
    most = 0
    for buffer in distinct(buffers(job, candidate)):
        kept = kept_format(job.precision, candidate.optimizer_state_format, buffer.element_bytes)
        tile = min(buffer.part, tile_elements(kept, tile_size, device))
        most = max(most, int(tile * TEMPORARY_BYTES[kept]))
    return most


def untiled_bytes(job: Job, candidate: Candidate, per_element: float = 4) -> float:
    """Temporary memory of a step that upcasts the gradients of a rank's 16-bit shards all at once."""
    return per_element * sum(b.part for b in buffers(job, candidate) if b.element_bytes < 4)
