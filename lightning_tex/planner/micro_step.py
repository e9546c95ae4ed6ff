"""One micro-step of one rank in numbers: tokens, rows at the experts, bytes of a number."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from lightning_tex.layers.linear_cross_entropy import chunk_sizes
from lightning_tex.moe.capacity import buffer_rows, capacity
from lightning_tex.moe.exchange import even_parts
from lightning_tex.moe.expert_axes import DispatchCase
from lightning_tex.parallel.layout import Communication, Layout
from lightning_tex.planner.layers import Embedding, Head, Moe
from lightning_tex.planner.layouts import Candidate, Job

# T tokens of a data rank's micro-batch, s of them held between layers (T/tensor under sequence parallelism, else T),
# E experts, k choices per token, N rows at a rank's experts


@dataclass(frozen=True)
class MicroStep:
    """What a rank's part of a micro-step is counted in.

    Args:
        job, candidate: what is trained, and how.
    """

    job: Job
    candidate: Candidate

    @property
    def layout(self) -> Layout:
        return self.candidate.layout

    @property
    def communication(self) -> Communication:
        return self.candidate.communication

    @property
    def sequences(self) -> int:
        """Of a data rank's micro-batch."""
        return self.candidate.micro_batch

    @property
    def tokens(self) -> int:
        """T."""
        return self.candidate.micro_batch * self.job.sequence_length

    @property
    def held(self) -> int:
        """s."""
        return self.tokens // self.layout.tensor if self.candidate.sequence_parallel else self.tokens

    @property
    def element_bytes(self) -> int:
        """Of an activation."""
        return self.job.dtypes.usual.itemsize

    @property
    def score_bytes(self) -> int:
        """Of a router's score, and of logits in a loss: fp32, or fp64 of fp64."""
        return max(4, self.element_bytes)

    def columns(self, layer: Embedding | Head) -> int:
        """Of the vocabulary, what a rank has, padding included."""
        return -(-layer.vocab_size // self.layout.tensor)

    def loss_chunks(self, head: Head, device: str) -> list[int]:
        """Tokens of each chunk that a linear cross-entropy takes of this head's logits."""
        return chunk_sizes(self.tokens, self.columns(head), self.element_bytes, device)

    # --- rows at the experts

    @property
    def split(self) -> int:
        """Ranks that equal tokens are split over before they travel."""
        return DispatchCase.of(self.communication).sizes(self.layout)[0]

    @property
    def gather(self) -> int:
        """Ranks that what arrived is put together over."""
        return DispatchCase.of(self.communication).sizes(self.layout)[1]

    @property
    def chunks(self) -> int:
        """That a MoE layer's rows travel in."""
        return self.communication.expert_chunks if self.layout.expert > 1 else 1

    def static(self, layer: Moe) -> bool:
        """Whether rows travel in buffers of a shape that does not depend on the routing."""
        travels = max(self.layout.expert, self.split, self.gather) > 1
        return layer.capacity_factor is not None and not self.communication.sequence_parallel and travels

    def moved(self, layer: Moe) -> bool:
        """Whether rows at the experts come from, or sums of theirs go to, other ranks: elsewhere nobody keeps them."""
        return self.static(layer) or max(self.layout.expert, self.layout.expert_tensor) > 1

    def capacity_rows(self, layer: Moe) -> int:
        """Rows of the buffer per expert, C: of one data rank's tokens, a multiple of the ranks that split it."""
        assert layer.capacity_factor is not None
        allowed = capacity(layer.capacity_factor, layer.top_k, self.tokens, layer.num_experts, layer.min_capacity)
        return buffer_rows(allowed, self.split)

    def chosen_rows(self, layer: Moe) -> int:
        """Rows that a rank sends without buffers: its own choices; the longest share where they do not divide."""
        return sum(self._chosen(layer))

    def _chosen(self, layer: Moe) -> list[int]:
        sequence = self.communication.sequence_parallel
        tokens = -(-self.tokens // (self.layout.tensor if sequence else self.split))
        rows = [part * layer.top_k for part in even_parts(tokens, self.chunks)]
        if sequence and layer.capacity_factor is not None:
            rows = [min(part, int(layer.capacity_factor * part)) for part in rows]  # what overflows does not travel
        return rows

    def sent_rows(self, layer: Moe) -> list[int]:
        """Rows that a rank sends in each chunk."""
        if not self.static(layer):
            return self._chosen(layer)
        own = self.capacity_rows(layer) // self.split
        return [layer.num_experts * part for part in even_parts(own, max(1, min(self.chunks, own)))]

    def rows(self, layer: Moe) -> int:
        """N, at the fullest rank, when choices fall evenly but for the job's imbalance."""
        if self.static(layer):
            return layer.num_experts * self.capacity_rows(layer) // self.split * self.gather
        imbalance = self.job.imbalance if self.layout.expert > 1 else 1
        if layer.round_factor is not None:
            imbalance = min(imbalance, layer.round_factor)
        return ceil(self.chosen_rows(layer) * self.gather * imbalance)

    def own_tokens(self, layer: Moe) -> int:
        """Tokens whose choices this rank brings home."""
        return self.tokens if self.static(layer) else -(-self.held // self.split)
