"""Every collective of an optimizer step: what the byte meter counts, as formulas over sizes.

One list serves bytes and time. Bytes are exact where routing is known: capacity without sequence parallelism always,
dropless (and capacity under sequence parallelism) when the choices fall evenly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from lightning_tex.moe.capacity import buffer_rows, capacity
from lightning_tex.moe.expert_axes import DispatchCase
from lightning_tex.parallel.byte_meter import Sent
from lightning_tex.parallel.topology import Communication, Layout
from lightning_tex.planner.layouts import Candidate, Job
from lightning_tex.planner.sizes import ModelSizes
from lightning_tex.planner.states import Buffer, buffers

_INT64 = 8
# Passes of a micro-step; the optimizer's own is the step's.
FORWARD, RECOMPUTED, BACKWARD, OPTIMIZER = "forward", "recompute", "backward", "optimizer"

# B sequences, S positions, T = B S tokens of a data rank's micro-batch, D model width, E experts, k choices per token


class Collective(NamedTuple):
    """A collective that happens ``times`` times in a pass.

    Args:
        operation: what is done.
        axis, size: over which axis, and its ranks.
        during: the pass.
        whole_bytes: of the whole tensor: what an all-reduce sums, an all-gather gives, a reduce-scatter takes, and what
            a rank gives to an all-to-all, its own part included.
        times: how often.
        counted_as: its name in the byte meter; empty: the operation.
    """

    operation: str
    axis: str
    size: int
    during: str
    whole_bytes: int
    times: int = 1
    counted_as: str = ""

    @property
    def sent_bytes(self) -> Fraction:
        """Bytes that a rank sends, each time, by ring costs."""
        return ring(self.operation, self.size, self.whole_bytes)

    @property
    def key(self) -> Sent:
        return Sent(self.counted_as or self.operation, self.axis, self.during)


def ring(operation: str, ranks: int, whole_bytes: int) -> Fraction:
    """Bytes that a rank sends: (n-1)/n of the whole, twice that in an all-reduce."""
    return Fraction((2 if operation == "all_reduce" else 1) * (ranks - 1) * whole_bytes, ranks)


def sent_bytes(collectives: Iterable[Collective]) -> dict[Sent, Fraction]:
    """Bytes that a rank sends, by what the byte meter tells apart."""
    total: dict[Sent, Fraction] = {}
    for each in collectives:
        total[each.key] = total.get(each.key, Fraction(0)) + each.times * each.sent_bytes
    return total


@dataclass(frozen=True)
class MicroStepTraffic:
    """Collectives of one micro-step of one data rank, part by part.

    Args:
        sizes: the model.
        layout: sizes of the axes.
        communication: how it communicates.
        activation_checkpointing: as the strategy's.
        sequences, length: B and S.
        element_bytes: of an activation.
        score_bytes: of a router's score: 4, or 8 in fp64.
    """

    sizes: ModelSizes
    layout: Layout
    communication: Communication
    activation_checkpointing: str | None
    sequences: int
    length: int
    element_bytes: int
    score_bytes: int = 4

    @classmethod
    def of(cls, job: Job, candidate: Candidate) -> MicroStepTraffic:
        score = 8 if job.precision == "64-true" else 4
        return cls(job.sizes, candidate.layout, candidate.communication, candidate.activation_checkpointing,
                   candidate.micro_batch, job.sequence_length, job.element_bytes, score)  # fmt: skip

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def stream_bytes(self) -> int:
        """The activations between layers, whole: [T, D]."""
        return self.element_bytes * self.tokens * self.sizes.dim

    def _over(
        self, axis: str, operation: str, whole_bytes: int, passes: Iterable[str], counted_as: str = ""
    ) -> Iterator[Collective]:
        size = getattr(self.layout, axis)
        if size > 1:
            for during in passes:
                yield Collective(operation, axis, size, during, whole_bytes, 1, counted_as)

    @property
    def forward(self) -> tuple[str, ...]:
        """The passes in which a block's forward communicates."""
        return (FORWARD, RECOMPUTED) if self.activation_checkpointing == "full" else (FORWARD,)

    def _enter(self, forward: Iterable[str]) -> Iterator[Collective]:
        """Into a region sharded over tensor."""
        if self.communication.sequence_parallel:
            yield from self._over("tensor", "all_gather", self.stream_bytes, forward)
            yield from self._over("tensor", "reduce_scatter", self.stream_bytes, [BACKWARD])
        else:
            yield from self._over("tensor", "all_reduce", self.stream_bytes, [BACKWARD])

    def _leave(self, forward: Iterable[str]) -> Iterator[Collective]:
        """Out of a region sharded over tensor."""
        if self.communication.sequence_parallel:
            yield from self._over("tensor", "reduce_scatter", self.stream_bytes, forward)
            yield from self._over("tensor", "all_gather", self.stream_bytes, [BACKWARD])
        else:
            yield from self._over("tensor", "all_reduce", self.stream_bytes, forward)

    def ends(self) -> Iterator[Collective]:
        """Embedding, head and cross-entropy, which are not recomputed."""
        yield from self._leave([FORWARD])
        yield from self._enter([FORWARD])
        for of in (1, 3):  # the largest logit; sum, target and whether it was found: in fp32
            yield from self._over("tensor", "all_reduce", of * self.score_bytes * self.tokens, [FORWARD])

    def attention(self) -> Iterator[Collective]:
        yield from self._enter(self.forward)
        yield from self._leave(self.forward)

    def mlp(self) -> Iterator[Collective]:
        yield from self._enter(self.forward)
        # A recomputation stops at the block's last saved tensor, which is what the last product multiplies.
        yield from self._leave([FORWARD])

    def moe(self) -> Iterator[Collective]:
        """Router, dispatch, combine and routing losses."""
        sizes, forward = self.sizes, self.forward
        sequence = self.communication.sequence_parallel
        if not sequence:
            yield from self._over("tensor", "broadcast", _INT64 * self.tokens * sizes.top_k, forward)
        if sizes.capacity_factor is None or sequence:
            yield from self._dropless(forward)
        else:
            yield from self._capacity(forward)
        if sizes.routing_losses:
            totals = self.score_bytes * (2 * sizes.num_experts + 2)
            for axis in ("tensor", "data") if sequence else ("data",):
                yield from self._over(axis, "all_reduce", totals, [FORWARD])

    def _capacity(self, forward: tuple[str, ...]) -> Iterator[Collective]:
        yield from self._over("expert", "all_reduce", _INT64, forward, "exchange_counts")
        buffer = self.element_bytes * self.sizes.num_experts * self.capacity_rows * self.sizes.dim
        yield from self._ways(buffer, forward)

    def _dropless(self, forward: tuple[str, ...]) -> Iterator[Collective]:
        sizes, layout, sequence = self.sizes, self.layout, self.communication.sequence_parallel
        counts = _INT64 * sizes.num_experts
        if sequence and sizes.capacity_factor is not None:
            queues = layout.tensor * sizes.top_k * self.sequences * (sizes.num_experts + 1)
            yield from self._over("tensor", "all_gather", _INT64 * queues, forward, "exchange_counts")
        yield from self._over("expert", "all_to_all", counts, forward, "exchange_counts")
        if self.gather > 1:
            whole = self.gather * counts
            yield from self._over("expert_tensor", "all_gather", whole, forward, "exchange_counts")
        if self.split > 1:  # gathers are padded to the longest part
            longest = self.split * -(-self.tokens // self.split)
            yield from self._over("tensor", "all_gather", self.element_bytes * longest * sizes.dim, [BACKWARD])
            yield from self._over("tensor", "all_gather", self.score_bytes * longest * sizes.top_k, [BACKWARD])
            # Nothing that is saved comes after it: a recomputation has stopped by then.
            yield from self._over("tensor", "all_gather", self.element_bytes * longest * sizes.dim, [FORWARD])
        yield from self._ways(self.element_bytes * self.chosen_rows * self.split * sizes.dim, forward, home=False)

    def _ways(self, buffer: int, forward: tuple[str, ...], home: bool = True) -> Iterator[Collective]:
        """Out and home in every pass; in the backward each is the other. ``buffer``: bytes before the split."""
        share = buffer // self.split
        for during in ([each] for each in (*forward, BACKWARD)):
            for _ in range(2):
                yield from self._over("expert", "all_to_all", share, during)
            if self.gather > 1:
                yield from self._over("expert_tensor", "all_gather", share * self.gather, during)
            if self.gather > 1 and self.communication.fused:
                yield from self._over("expert_tensor", "reduce_scatter", share * self.gather, during)
            else:
                yield from self._over("expert_tensor", "all_reduce", share * self.gather, during)
            if home and self.split > 1:
                yield from self._over("tensor", "all_gather", buffer, during)

    # --- rows

    @property
    def split(self) -> int:
        """Ranks that equal tokens are split over before they travel."""
        return DispatchCase.of(self.communication).sizes(self.layout)[0]

    @property
    def gather(self) -> int:
        """Ranks that what arrived is put together over."""
        return DispatchCase.of(self.communication).sizes(self.layout)[1]

    @property
    def capacity_rows(self) -> int:
        """Rows of the buffer per expert, C: of one data rank's tokens, a multiple of the ranks that split it."""
        sizes = self.sizes
        assert sizes.capacity_factor is not None
        allowed = capacity(sizes.capacity_factor, sizes.top_k, self.tokens, sizes.num_experts)
        return buffer_rows(allowed, self.split)

    @property
    def chosen_rows(self) -> int:
        """Rows that a rank sends without buffers: its own choices; the longest share where they do not divide."""
        ranks = self.layout.tensor if self.communication.sequence_parallel else self.split
        rows = -(-self.tokens // ranks) * self.sizes.top_k
        if self.communication.sequence_parallel and self.sizes.capacity_factor is not None:
            rows = min(rows, int(self.sizes.capacity_factor * rows))  # what overflows does not travel
        return rows

    def arrived_rows(self) -> int:
        """Rows at the experts of a rank, N, when choices fall evenly."""
        sizes = self.sizes
        if sizes.capacity_factor is not None and not self.communication.sequence_parallel:
            return sizes.num_experts * self.capacity_rows // self.split * self.gather
        return self.chosen_rows * self.gather


def micro_step(job: Job, candidate: Candidate) -> list[Collective]:
    """Collectives of one micro-step: forward, recomputation and backward."""
    traffic, sizes = MicroStepTraffic.of(job, candidate), job.sizes
    found = list(traffic.ends())
    for times, part in (
        (sizes.num_layers, traffic.attention()),
        (sizes.dense_layers, traffic.mlp()),
        (sizes.moe_layers, traffic.moe()),
    ):
        found += [each._replace(times=times * each.times) for each in part if times]
    return found


def optimizer_step(job: Job, candidate: Candidate) -> list[Collective]:
    """Collectives of one optimizer step: gradients, their norm, parameters."""
    found: list[Collective] = []
    for buffer in buffers(job, candidate):
        found += reduction(buffer, candidate)
        found += combination(buffer, candidate)
        found += collection(buffer)
    if job.world > 1:
        found.append(Collective("all_reduce", "world", job.world, OPTIMIZER, 2 * 8))  # norm, and whether all is finite
    return found


def reduction(buffer: Buffer, candidate: Candidate) -> list[Collective]:
    """A buffer's gradients to their owners; under ZeRO 2 in every micro-step."""
    if buffer.replicas == 1:
        return []
    operation = "reduce_scatter" if buffer.owners > 1 else "all_reduce"
    times = candidate.accumulation if candidate.zero_stage == 2 else 1
    return [Collective(operation, _axis(buffer), buffer.replicas, OPTIMIZER, buffer.bytes, times)]


def combination(buffer: Buffer, candidate: Candidate) -> list[Collective]:
    """Partial sums of replicated parameters over tensor, of the own part, under sequence parallelism."""
    tensor = candidate.layout.tensor
    if not (buffer.repeated and candidate.sequence_parallel):
        return []
    element_bytes = max(4, buffer.element_bytes) if candidate.zero_stage == 2 else buffer.element_bytes
    return [Collective("all_reduce", "tensor", tensor, OPTIMIZER, element_bytes * buffer.part)]


def collection(buffer: Buffer) -> list[Collective]:
    """A buffer's parameters from their owners."""
    if buffer.owners == 1:
        return []
    return [Collective("all_gather", _axis(buffer), buffer.owners, OPTIMIZER, buffer.bytes)]


def step_collectives(job: Job, candidate: Candidate) -> list[Collective]:
    """Collectives of one optimizer step with all its micro-steps."""
    micro = [each._replace(times=each.times * candidate.accumulation) for each in micro_step(job, candidate)]
    return micro + optimizer_step(job, candidate)


def _axis(buffer: Buffer) -> str:
    return "expert_data" if buffer.expert else "data"
