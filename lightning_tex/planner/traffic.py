"""Every collective of an optimizer step: what the byte meter counts, as formulas over sizes.

It has what the package's own layers send; what a module sends besides is not known.
Bytes are exact where routing is known: capacity without sequence parallelism always,
dropless (and capacity under sequence parallelism) when the choices fall evenly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lightning_tex.planner.collective import BACKWARD, FORWARD, RECOMPUTED, Collective
from lightning_tex.planner.layers import (
    Attention,
    ColumnLinear,
    CrossEntropy,
    Embedding,
    Head,
    LatentAttention,
    Linear,
    LinearCrossEntropy,
    Mlp,
    Moe,
    Norm,
    Other,
    RowLinear,
)
from lightning_tex.planner.layouts import Candidate, Job
from lightning_tex.planner.micro_step import MicroStep
from lightning_tex.planner.model import PlacedLayer
from lightning_tex.planner.optimizer_traffic import optimizer_step

_INT64 = 8

# T tokens of a data rank's micro-batch


@dataclass(frozen=True)
class MicroStepTraffic:
    """Collectives of one micro-step of one data rank, layer by layer.

    Args:
        step: its numbers.
    """

    step: MicroStep

    def layer(self, placed: PlacedLayer) -> Iterator[Collective]:
        """Collectives of a layer in all passes.

        A recomputation stops at a block's last saved tensor, which is what the last product multiplies: what its last
        layer does after that is not repeated.
        """
        layer = placed.layer
        again = placed.in_block and self.step.candidate.activation_checkpointing == "full"
        forward = (FORWARD, RECOMPUTED) if again else (FORWARD,)
        last = (FORWARD,) if placed.ends_block else forward
        backward = (BACKWARD,) if placed.input_gradient else ()
        match layer:
            case Embedding():
                yield from self._leave(layer.dim, forward)
            case Attention():
                yield from self._enter(layer.dim, forward, backward)
                if layer.full_norms:  # sums of squares, of queries and of keys
                    sums = self.step.score_bytes * self.step.tokens
                    for _ in range(2):
                        yield from self._over("tensor", "all_reduce", sums, (*forward, BACKWARD))
                yield from self._leave(layer.dim, last)
            case LatentAttention():
                yield from self._enter(layer.entering, forward, backward)
                yield from self._leave(layer.dim, last)
            case Mlp():
                yield from self._enter(layer.dim, forward, backward)
                yield from self._leave(layer.dim, last)
            case ColumnLinear():
                yield from self._enter(layer.in_features, forward, backward)
                if layer.gather_output:
                    yield from self._gather_columns(layer.out_features, last)
            case RowLinear():
                yield from self._leave(layer.out_features, last)
            case Moe():
                if layer.shared is not None:  # which runs beside the way home
                    yield from self._enter(layer.dim, forward, backward)
                    yield from self._leave(layer.dim, forward if layer.shared_gate else last)
                yield from self._moe(layer, forward, last)
            case Head():
                yield from self._enter(layer.dim, forward, backward)
                if layer.gather_output:
                    columns = self.step.columns(layer) * self.step.layout.tensor
                    yield from self._over("tensor", "all_gather", self._stream_bytes(columns), last)
            case CrossEntropy():
                for of in (1, 3):  # the largest logit; sum, target and whether it was found: in fp32
                    whole = of * self.step.score_bytes * self.step.tokens
                    yield from self._over("tensor", "all_reduce", whole, forward)
            case LinearCrossEntropy():
                head = next(placed.layer for placed in self.step.job.model.layers if isinstance(placed.layer, Head))
                # The log of the sum of exponentials and the target's logit: in fp32, in as many chunks as on a GPU.
                for tokens in self.step.loss_chunks(head, "cuda"):
                    whole = 2 * self.step.score_bytes * tokens * self.step.layout.tensor
                    yield from self._over("tensor", "all_gather", whole, forward)
            case Norm() | Linear() | Other():
                pass

    def _stream_bytes(self, dim: int) -> int:
        """Activations between layers, whole: [T, dim]."""
        return self.step.element_bytes * self.step.tokens * dim

    def _over(
        self, axis: str, operation: str, whole_bytes: int, passes: Iterable[str], counted_as: str = ""
    ) -> Iterator[Collective]:
        size = self.step.layout.axis_size(axis)
        if size > 1:
            for during in passes:
                yield Collective(operation, axis, size, during, whole_bytes, 1, counted_as)

    def _enter(self, dim: int, forward: Iterable[str], backward: Iterable[str]) -> Iterator[Collective]:
        """Into a region sharded over tensor."""
        whole = self._stream_bytes(dim)
        if self.step.communication.sequence_parallel:
            yield from self._over("tensor", "all_gather", whole, forward)
            yield from self._over("tensor", "reduce_scatter", whole, backward)
        else:
            yield from self._over("tensor", "all_reduce", whole, backward)

    def _leave(self, dim: int, forward: Iterable[str]) -> Iterator[Collective]:
        """Out of a region sharded over tensor."""
        whole = self._stream_bytes(dim)
        if self.step.communication.sequence_parallel:
            yield from self._over("tensor", "reduce_scatter", whole, forward)
            yield from self._over("tensor", "all_gather", whole, [BACKWARD])
        else:
            yield from self._over("tensor", "all_reduce", whole, forward)

    def _gather_columns(self, dim: int, forward: Iterable[str]) -> Iterator[Collective]:
        whole = self._stream_bytes(dim)
        yield from self._over("tensor", "all_gather", whole, forward)
        if self.step.communication.sequence_parallel:
            yield from self._over("tensor", "all_gather", whole, [BACKWARD])

    def _moe(self, layer: Moe, forward: tuple[str, ...], last: tuple[str, ...]) -> Iterator[Collective]:
        """Router, dispatch, combine and routing losses."""
        step = self.step
        sequence = step.communication.sequence_parallel
        yield from self._decision(layer)
        if layer.overflow_by_score and not sequence:
            yield from self._over("tensor", "broadcast", step.score_bytes * step.tokens, [FORWARD])
        if step.static(layer):
            yield from self._capacity(layer, forward, last)
        else:
            yield from self._dropless(layer, forward, last)
        if layer.routing_losses:
            totals = step.score_bytes * (2 * layer.scored + 2 + layer.entropy_loss)
            for axis in ("tensor", "data") if sequence else ("data",):
                yield from self._over(axis, "all_reduce", totals, [FORWARD])
        if layer.sequence_balance:
            if sequence:
                of_sequences = step.score_bytes * step.sequences * (2 * layer.scored + 1)
                yield from self._over("tensor", "all_reduce", of_sequences, [FORWARD])
            yield from self._over("data", "all_reduce", 2 * step.score_bytes, [FORWARD])

    def _decision(self, layer: Moe) -> Iterator[Collective]:
        """Of the router; what is decided is not decided again."""
        step, deciding, experts = self.step, layer.deciding, layer.scored
        sequence = step.communication.sequence_parallel
        if not sequence:
            agreed = ((deciding.agreed_choices, _INT64), (deciding.agreed_scores, step.score_bytes))
            for numbers, size in (*agreed, (deciding.agreed_flags, 1)):
                if numbers:
                    yield from self._over("tensor", "broadcast", size * step.tokens * numbers, [FORWARD])
        for _ in range(deciding.column_sums):  # in fp64
            for axis in ("tensor", "data") if sequence else ("data",):
                yield from self._over(axis, "all_reduce", 8 * experts, [FORWARD])
        scores = step.score_bytes * step.tokens * (experts + 1)  # and which tokens are none
        if deciding.gathered_scores and sequence:
            yield from self._over("tensor", "all_gather", scores, [FORWARD])
        if deciding.gathered_scores == "batch":
            ranks = step.layout.axis_size("data")
            yield from self._over("data", "all_gather", _INT64 * ranks, [FORWARD], "exchange_counts")
            yield from self._over("data", "all_gather", scores * ranks, [FORWARD])

    def _capacity(self, layer: Moe, forward: tuple[str, ...], last: tuple[str, ...]) -> Iterator[Collective]:
        yield from self._over("expert", "all_reduce", _INT64, [FORWARD], "exchange_counts")
        yield from self._exchange(layer, forward, last)

    def _dropless(self, layer: Moe, forward: tuple[str, ...], last: tuple[str, ...]) -> Iterator[Collective]:
        step, sequence = self.step, self.step.communication.sequence_parallel
        counts, size = _INT64 * layer.num_experts, step.element_bytes
        if sequence and layer.capacity_factor is not None:
            if layer.overflow_by_score:  # choices, and scores that go before others
                exchanged = [_INT64 * step.tokens * layer.top_k, step.score_bytes * step.tokens]
            else:
                queues = step.layout.tensor * layer.top_k * step.sequences * (layer.num_experts + 1)
                exchanged = [_INT64 * queues]
            for whole in exchanged:
                yield from self._over("tensor", "all_gather", whole, [FORWARD], "exchange_counts")
        bounded = layer.round_factor is not None and step.layout.expert > 1
        # Everybody's, as all must agree on the rounds; or of each chunk.
        counts *= step.layout.expert if bounded else step.chunks
        operation = "all_gather" if bounded else "all_to_all"
        yield from self._over("expert", operation, counts, [FORWARD], "exchange_counts")
        if step.gather > 1:
            whole = step.gather * counts
            yield from self._over("expert_tensor", "all_gather", whole, [FORWARD], "exchange_counts")
        if step.split > 1:  # gathers are padded to the longest part
            longest = step.split * -(-step.tokens // step.split)
            yield from self._over("tensor", "all_gather", size * longest * layer.dim, [BACKWARD])
            of_weights = [BACKWARD] if layer.deciding.learned else []
            weights = step.score_bytes * longest * layer.deciding.slots
            yield from self._over("tensor", "all_gather", weights, of_weights)
            yield from self._over("tensor", "all_gather", size * longest * layer.dim, last)
        yield from self._exchange(layer, forward, last, home=False)

    def _exchange(
        self, layer: Moe, forward: tuple[str, ...], last: tuple[str, ...], home: bool = True
    ) -> Iterator[Collective]:
        """Rows and their weights to the experts, rows back, chunk by chunk; in the backward each the other way.

        Args:
            forward, last: passes of the way there, and of the way back.
            home: what comes back is gathered over the split axis.
        """
        row, weight = self.step.element_bytes * layer.dim, self.step.score_bytes
        of_weights = (BACKWARD,) if layer.deciding.learned else ()
        for sent in self.step.sent_rows(layer):
            rows = sent * self.step.split
            for of_row, there, back in ((row, (*forward, BACKWARD), (*last, BACKWARD)), (weight, forward, of_weights)):
                yield from self._to_experts(rows * of_row, there)
                yield from self._from_experts(rows * of_row, back, home)

    def _to_experts(self, buffer: int, passes: Iterable[str]) -> Iterator[Collective]:
        share = buffer // self.step.split
        yield from self._over("expert", "all_to_all", share, passes)
        if self.step.gather > 1:
            yield from self._over("expert_tensor", "all_gather", share * self.step.gather, passes)

    def _from_experts(self, buffer: int, passes: Iterable[str], home: bool) -> Iterator[Collective]:
        step = self.step
        share = buffer // step.split
        operation = "reduce_scatter" if step.gather > 1 and step.communication.fused else "all_reduce"
        yield from self._over("expert_tensor", operation, share * step.gather, passes)
        yield from self._over("expert", "all_to_all", share, passes)
        if home and step.split > 1:
            yield from self._over("tensor", "all_gather", buffer, passes)


def micro_step(job: Job, candidate: Candidate) -> list[Collective]:
    """Collectives of one micro-step: forward, recomputation and backward."""
    traffic = MicroStepTraffic(MicroStep(job, candidate))
    return [
        collective._replace(times=times * collective.times)
        for placed, times in job.model.layer_counts.items()
        for collective in traffic.layer(placed)
    ]


def step_collectives(job: Job, candidate: Candidate) -> list[Collective]:
    """Collectives of one optimizer step with all its micro-steps."""
    micro = [each._replace(times=each.times * candidate.accumulation) for each in micro_step(job, candidate)]
    return micro + optimizer_step(job, candidate)
