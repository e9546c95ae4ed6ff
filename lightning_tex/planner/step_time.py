"""Time of an optimizer step, broken down: computation, each collective on each axis, the optimizer, what overlaps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from lightning_tex.planner.cluster import Cluster
from lightning_tex.planner.collective import Collective
from lightning_tex.planner.expert_overlap import hidden_exchange
from lightning_tex.planner.layouts import Candidate, Job
from lightning_tex.planner.links import seconds
from lightning_tex.planner.model import ModelDescription
from lightning_tex.planner.model_flops import model_flops
from lightning_tex.planner.optimizer_traffic import (
    NORM_BYTES,
    collection,
    combination,
    matrices_and_back,
    reduction,
)
from lightning_tex.planner.states import Buffer, FlatBuffers, kept_format
from lightning_tex.planner.traffic import micro_step
from lightning_tex.planner.work import Computation, computation

# Bytes that a step reads and writes for an element of the own part: AdamW's states, master, gradient, parameter, and
# the temporaries of each format (docs/optimizer.md).
STEP_BYTES = {"fp32": 36, "split": 44, "int8": 60, "stochastic": 52}


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step.

    Args:
        forward, recompute, backward: computation of all micro-steps.
        communication: of collectives that computation waits for, by (operation, axis).
        optimizer: of the update.
        reduction, collection: of gradients to their owners and of parameters from them, as long as they take.
        hidden: of these two, what runs beside the backward, the update and the forward that follows.
        tokens: of the step.
        model_flops: of the step, all ranks.
        peak_flops: of all ranks together.
    """

    forward: float
    recompute: float
    backward: float
    communication: dict[tuple[str, str], float]
    optimizer: float
    reduction: float
    collection: float
    hidden: float
    tokens: int
    model_flops: float
    peak_flops: float

    @property
    def computation(self) -> float:
        return self.forward + self.recompute + self.backward

    @property
    def total(self) -> float:
        visible = self.reduction + self.collection - self.hidden
        return self.computation + sum(self.communication.values()) + self.optimizer + visible

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.total

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the hardware could have done: see :mod:`lightning_tex.planner.work`."""
        return self.model_flops / (self.total * self.peak_flops)

    def parts(self) -> dict[str, float]:
        """What the total is made of, in seconds; the sum is the total."""
        found = {"forward": self.forward, "recompute": self.recompute, "backward": self.backward}
        for (operation, axis), time in self.communication.items():
            found[f"{operation} over {axis}"] = time
        found["optimizer"] = self.optimizer
        found["gradients and parameters, not hidden"] = self.reduction + self.collection - self.hidden
        return found


def step_time(job: Job, candidate: Candidate, cluster: Cluster, flat: FlatBuffers | None = None) -> StepTime:
    """Foresee the time of an optimizer step.

    Computation waits for the collectives of layers. Gradients are reduced beside the last backward (ZeRO 2: every one),
    buffer by buffer as they are complete; parameters are collected beside the update of the buffers that follow and the
    first forward of the next step. One chunk of a MoE layer's tokens travels beside the products of another.

    Args:
        job, candidate: what is trained, and how.
        cluster: on what.
        flat: the candidate's flat buffers, if they have been laid out already.
    """
    layout, computed = candidate.layout, computation(job, candidate, cluster)
    steps = candidate.accumulation
    communication: dict[tuple[str, str], float] = {}
    for collective in micro_step(job, candidate):
        key = collective.operation, collective.axis
        communication[key] = communication.get(key, 0.0) + steps * collective.times * seconds(
            collective, layout, cluster
        )
    if hidden_beside_experts := hidden_exchange(job, candidate, cluster):
        communication["all_to_all", "expert"] -= steps * cluster.overlap * hidden_beside_experts
    if job.world > 1:
        norm = Collective("all_reduce", "world", job.world, "optimizer", NORM_BYTES)
        communication["all_reduce", "world"] = seconds(norm, layout, cluster)
    flat = flat or FlatBuffers.of(job, candidate)
    once = replace(candidate, micro_batch=1, accumulation=1)
    flat_times = _buffer_times(flat, once, cluster)
    if flat_times.combination:
        before = communication.get(("all_reduce", "tensor"), 0.0)
        communication["all_reduce", "tensor"] = before + flat_times.combination
    for collective in matrices_and_back(flat, candidate, cluster.device):
        key = collective.operation, collective.axis
        taken = collective.times * seconds(collective, layout, cluster)
        communication[key] = communication.get(key, 0.0) + taken
    of_matrices = flat.matrices.kept(flat.has_masters).flops / cluster.peak(job.precision)
    windows = steps if candidate.zero_stage == 2 else 1
    collecting = sum(flat_times.collections)
    hidden = min(collecting - flat_times.collections[-1], flat_times.update - flat_times.first_update)
    if candidate.communication.overlap:
        hidden = collecting - _forward_waits(job.model, flat, computed, flat_times.collections, hidden)
        hidden += windows * _beside_backward(job.model, flat, computed, flat_times.reductions)
    hidden *= cluster.overlap
    return StepTime(
        computed.forward * steps,
        computed.recompute * steps,
        computed.backward * steps,
        communication,
        flat_times.update + of_matrices,
        windows * sum(flat_times.reductions),
        collecting,
        hidden,
        job.tokens,
        model_flops(job),
        cluster.peak(job.precision) * job.world,
    )


def _beside_backward(
    model: ModelDescription, flat: FlatBuffers, computed: Computation, reductions: tuple[float, ...]
) -> float:
    """Seconds of all buffers' reductions, one after another as they are complete, while a backward still runs."""
    # When the backward has passed each part, from the last to the first.
    passed = list(accumulate(reversed(computed.backward_of_parts)))[::-1]
    complete = [passed[model.part_of_layer[model.parameters[place].layer]] for place in flat.first_members]
    now = 0.0
    for ready, taken in sorted(zip(complete, reductions, strict=True)):
        now = max(now, ready) + taken
    return sum(reductions) - max(0.0, now - passed[0])


def _forward_waits(
    model: ModelDescription,
    flat: FlatBuffers,
    computed: Computation,
    collections: tuple[float, ...],
    beside_update: float,
) -> float:
    """Seconds that a forward waits for buffers, which are collected one after another while it already runs.

    Args:
        beside_update: seconds of collection that are over when it begins.
    """
    # When the forward comes to each part, if it waits for nothing.
    reached = list(accumulate(computed.forward_of_parts, initial=0.0))
    needed = [reached[model.part_of_layer[model.parameters[place].layer]] for place in flat.first_members]
    arrived = accumulate(collections, initial=-beside_update)
    next(arrived)
    return max(0.0, *(there - wanted for there, wanted in zip(arrived, needed, strict=True)))


class _BufferTimes(NamedTuple):
    """Seconds of what is done to each flat buffer, to all, or to the first one, in one micro-step or step."""

    reductions: tuple[float, ...]
    combination: float
    update: float
    first_update: float
    collections: tuple[float, ...]


@lru_cache(maxsize=4096)
def _buffer_times(flat: FlatBuffers, candidate: Candidate, cluster: Cluster) -> _BufferTimes:
    def time(collectives: list[Collective]) -> float:
        return sum(c.times * seconds(c, candidate.layout, cluster) for c in collectives)

    def all_of(one: Callable[[Buffer], float]) -> float:
        return sum(times * one(buffer) for buffer, times in flat.distinct.items())

    def reducing(buffer: Buffer) -> float:
        return time(reduction(buffer, candidate))

    def updating(buffer: Buffer) -> float:
        return update_seconds(buffer, flat.precision, candidate, cluster)

    reduced = {buffer: reducing(buffer) for buffer in flat.distinct}
    collected = {buffer: time(collection(buffer)) for buffer in flat.distinct}
    combining = all_of(lambda buffer: time(combination(buffer, candidate)))
    return _BufferTimes(
        tuple(reduced[buffer] for buffer in flat.buffers),
        combining,
        all_of(updating),
        updating(flat.buffers[0]),
        tuple(collected[buffer] for buffer in flat.buffers),
    )


def update_seconds(buffer: Buffer, precision: str, candidate: Candidate, cluster: Cluster) -> float:
    """Zeroing the gradients, their norm, and the update of the own part, by memory bandwidth."""
    kept = kept_format(precision, candidate.optimizer_state_format, buffer.element_bytes)
    # Plainly kept: gradient read, parameter and two states read and written.
    per_element = 7 * buffer.element_bytes if kept == "plain" else STEP_BYTES[kept]
    moved = buffer.bytes + buffer.part * (buffer.element_bytes + per_element)
    return moved / cluster.memory_bandwidth
