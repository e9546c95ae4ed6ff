"""Collectives that come once in an optimizer step: gradients, their norm, parameters, and whole matrices."""

from __future__ import annotations

from lightning_tex.planner.collective import OPTIMIZER, Collective
from lightning_tex.planner.layers import Moe
from lightning_tex.planner.layouts import Candidate, Job
from lightning_tex.planner.states import Buffer, FlatBuffers

# A step's norm, and whether gradients and losses are finite, over all ranks.
NORM_BYTES = 3 * 8

_INT64 = 8


def optimizer_step(job: Job, candidate: Candidate) -> list[Collective]:
    """Collectives of one optimizer step: gradients, their norm, parameters."""
    found: list[Collective] = []
    flat = FlatBuffers.of(job, candidate)
    found += matrices_and_back(flat, candidate)
    for buffer in flat.buffers:
        found += reduction(buffer, candidate)
        found += combination(buffer, candidate)
        found += collection(buffer)
    found += counted_choices(job, candidate)
    if job.world > 1:
        found.append(Collective("all_reduce", "world", job.world, OPTIMIZER, NORM_BYTES))
    return found


def counted_choices(job: Job, candidate: Candidate) -> list[Collective]:
    """What biases of experts move by: whole numbers of all ranks' tokens."""
    return [
        Collective("all_reduce", axis, candidate.layout.axis_size(axis), OPTIMIZER, _INT64 * layer.scored, times)
        for layer, times in ((placed.layer, times) for placed, times in job.model.layer_counts.items())
        if isinstance(layer, Moe) and layer.deciding.counts_steps
        for axis in (("tensor", "data") if candidate.sequence_parallel else ("data",))
        if candidate.layout.axis_size(axis) > 1
    ]


def reduction(buffer: Buffer, candidate: Candidate) -> list[Collective]:
    """A buffer's gradients to their owners; under ZeRO 2 in every micro-step."""
    if buffer.replicas == 1:
        return []
    operation = "reduce_scatter" if buffer.owners > 1 else "all_reduce"
    times = candidate.accumulation if candidate.zero_stage == 2 else 1
    return [Collective(operation, _axis(buffer), buffer.replicas, OPTIMIZER, buffer.bytes, times)]


def combination(buffer: Buffer, candidate: Candidate) -> list[Collective]:
    """Partial sums of replicated parameters over tensor, of the own part: under sequence parallelism, or declared."""
    tensor = candidate.layout.tensor
    if not (buffer.partial and (buffer.declared_partial or candidate.sequence_parallel)):
        return []
    element_bytes = max(4, buffer.element_bytes) if candidate.zero_stage == 2 else buffer.element_bytes
    return [Collective("all_reduce", "tensor", tensor, OPTIMIZER, element_bytes * buffer.part)]


def matrices_and_back(flat: FlatBuffers, candidate: Candidate, device: str = "cuda") -> list[Collective]:
    """Whole matrices to their owners and back, on the mean of all ranks."""
    return [
        Collective("all_to_all", axis.name, axis.size, OPTIMIZER, sent / times * axis.size / (axis.size - 1), times)
        for axis, times, sent in flat.matrices.sent(flat.has_masters, candidate.zero_stage, device)
    ]


def collection(buffer: Buffer) -> list[Collective]:
    """A buffer's parameters from their owners."""
    if buffer.owners == 1:
        return []
    return [Collective("all_gather", _axis(buffer), buffer.owners, OPTIMIZER, buffer.bytes)]


def _axis(buffer: Buffer) -> str:
    return "expert_data" if buffer.expert else "data"
