"""Bytes that one micro-step's forward keeps for its backward, from what autograd saves in each layer's code."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from lightning_tex.planner.layouts import Candidate, Job
from lightning_tex.planner.sizes import ELEMENT_BYTES, ModelSizes
from lightning_tex.planner.traffic import MicroStepTraffic

_INT64 = 8

# T tokens of a data rank's micro-batch, s of them held between layers (T/tensor under sequence parallelism, else T),
# D model width, H hidden width, E experts, k choices per token, N rows at a rank's experts, v columns of the logits


@dataclass(frozen=True)
class Activations:
    """Activations of one rank in one micro-step, in bytes.

    Args:
        job, candidate: what is trained, and how.
    """

    job: Job
    candidate: Candidate

    @property
    def _sizes(self) -> ModelSizes:
        return self.job.sizes

    @property
    def _traffic(self) -> MicroStepTraffic:
        return MicroStepTraffic.of(self.job, self.candidate)

    @property
    def _bytes(self) -> int:
        return self.job.element_bytes

    @property
    def _norm_bytes(self) -> int:
        """Of a number as norms see it: their weights' dtype."""
        return ELEMENT_BYTES[self.job.precision][1]

    @property
    def score_bytes(self) -> int:
        """Of a router's score."""
        return self._traffic.score_bytes

    @property
    def tokens(self) -> int:
        """T."""
        return self.candidate.micro_batch * self.job.sequence_length

    @property
    def held(self) -> int:
        """s."""
        return self.tokens // self.candidate.layout.tensor if self.candidate.sequence_parallel else self.tokens

    @property
    def stream(self) -> int:
        """What a block is given: [s, D]."""
        return self.held * self._sizes.dim * self._bytes

    @property
    def norm_sees_stream(self) -> bool:
        """Whether a norm keeps the stream itself, and no copy in another precision."""
        return self._norm_bytes == self._bytes

    @property
    def arrived(self) -> int:
        """Rows at the experts: [N, D]."""
        return self.rows * self._sizes.dim * self._bytes

    @property
    def home(self) -> int:
        """What comes home, by choice: [t k, D]."""
        return self._own_tokens * self._sizes.top_k * self._sizes.dim * self._bytes

    @property
    def hidden(self) -> int:
        """One tensor between the experts' products: [N, H]."""
        return self.rows * self._sizes.hidden // self.candidate.layout.expert_tensor * self._bytes

    @property
    def gather(self) -> int:
        """Ranks that what arrived is put together over."""
        return self._traffic.gather

    @property
    def rows(self) -> int:
        """N, at the fullest rank."""
        rows = self._traffic.arrived_rows()
        static = self._sizes.capacity_factor is not None and not self.candidate.sequence_parallel
        return rows if static else ceil(rows * self.job.imbalance)

    @property
    def columns(self) -> int:
        """v."""
        return -(-self._sizes.vocab_size // self.candidate.layout.tensor)

    @property
    def _whole(self) -> int:
        """Activations inside a region sharded over tensor, before they are sharded: [T, D]."""
        return self.tokens * self._sizes.dim * self._bytes

    def norm(self) -> int:
        """The input in the weight's dtype, and a scale a token."""
        return self.held * (self._sizes.dim + 1) * self._norm_bytes

    def attention(self) -> int:
        """The input of the projections; sines and cosines; what the attention kernel saves, its result included."""
        sizes, tensor = self._sizes, self.candidate.layout.tensor
        heads = 2 * sizes.num_heads + 2 * sizes.kv_heads  # query and result, key and value
        kernel = self.tokens * heads * sizes.head_dim // tensor * self._bytes
        log_sums = self.tokens * sizes.num_heads // tensor * max(4, self._bytes)
        rotary = 4 * self.job.sequence_length * sizes.head_dim * self._bytes
        return self._whole + rotary + kernel + log_sums

    def mlp(self) -> int:
        """The input of the first product, and what stands between the products."""
        hidden = self.tokens * self._sizes.hidden // self.candidate.layout.tensor * self._bytes
        return self._whole + self._between * hidden

    @property
    def _between(self) -> int:
        """Tensors of hidden width: gelu's input and result; of swiglu both products, silu's result and the product."""
        return 2 if self._sizes.activation == "gelu" else 4

    def router(self) -> int:
        """The input in full precision, scores, choices, and for the routing losses logits."""
        sizes = self._sizes
        per_token = self.score_bytes * (sizes.dim + sizes.num_experts) + _INT64 * sizes.top_k
        if sizes.norm_topk_prob:
            per_token += self.score_bytes * (sizes.top_k + 1)
        return self.held * per_token + self.routing_losses()

    def routing_losses(self) -> int:
        """Logits and two numbers of each token; kept in recomputation as well."""
        if not self._sizes.routing_losses:
            return 0
        return self.held * self.score_bytes * (self._sizes.num_experts + 1)

    def experts(self) -> int:
        """Rows that arrived, and what stands between the products."""
        return self.arrived + self._between * self.hidden

    def combine(self) -> int:
        """What came home, by choice, and the weights: all that are held, of which the own may be a view."""
        return self.home + self._sizes.top_k * self.held * self.score_bytes

    def indices(self) -> int:
        """Which row each choice has, and the order of rows: int64 numbers that the way keeps."""
        sizes, traffic = self._sizes, self._traffic
        slots = self._own_tokens * sizes.top_k
        if sizes.capacity_factor is not None and not self.candidate.sequence_parallel:
            return _INT64 * (slots + sizes.num_experts * traffic.capacity_rows)
        return _INT64 * (slots + traffic.chosen_rows + 2 * self.rows)

    @property
    def _own_tokens(self) -> int:
        """Tokens whose choices this rank brings home."""
        if self._sizes.capacity_factor is not None and not self.candidate.sequence_parallel:
            return self.tokens
        split = self._traffic.split
        return -(-self.held // split)

    def block(self, experts: bool) -> int:
        """Everything that a block keeps without recomputation."""
        mixing = self.router() + self.experts() + self.combine() + self.indices() if experts else self.mlp()
        return 2 * self.norm() + self.attention() + mixing

    def stash(self, experts: bool) -> int:
        """What communication-aware recomputation keeps of a block's collectives."""
        if self.candidate.activation_checkpointing != "communication_aware":
            return 0
        sizes, layout, traffic = self._sizes, self.candidate.layout, self._traffic
        sequence, sharded = self.candidate.sequence_parallel, layout.tensor > 1
        enter = self._whole if sharded and sequence else 0
        leave = self.stream if sharded else 0
        if not experts:
            return 2 * (enter + leave)
        total = enter + leave
        if sharded and not sequence:
            total += _INT64 * self.tokens * sizes.top_k
        static = sizes.capacity_factor is not None and not sequence
        if static:
            total += _INT64 if layout.expert > 1 else 0
        else:
            counts = _INT64 * sizes.num_experts
            total += counts * (layout.expert > 1) + traffic.gather * counts * (traffic.gather > 1)
            if sequence and sharded and sizes.capacity_factor is not None:
                total += _INT64 * layout.tensor * sizes.top_k * traffic.sequences * (sizes.num_experts + 1)
            if traffic.split > 1:
                total += self._whole
        return total + self.arrived + self.home

    def kept(self, experts: bool) -> int:
        """What is left of a block when its forward is over, stash included."""
        if self.candidate.activation_checkpointing is None:
            return self.block(experts)
        losses = self.routing_losses() if experts else 0
        return self.stream + losses + self.stash(experts)

    def ends(self) -> int:
        """Embedding, last norm and head, without the logits."""
        ids = self.tokens * _INT64 * 2 + self.tokens
        return ids + self.norm() + self._whole

    def logits(self) -> int:
        """The most that logits take at once: themselves, in full precision, and their softmax or gradient."""
        score = self.score_bytes
        copies = 2 * score if score == self._bytes else 2 * score + self._bytes
        return self.tokens * self.columns * copies

    def head_backward(self) -> int:
        """Gradients of the logits, of the head's matrix and of its input."""
        return self.tokens * self.columns * self._bytes + self.vocabulary + self._whole

    def embedding_backward(self) -> int:
        """Gradients of the stream and of the embedding."""
        return self.stream + self.vocabulary

    @property
    def vocabulary(self) -> int:
        """The own part of the embedding or the head."""
        return self.columns * self._sizes.dim * self._bytes

    def forward(self) -> int:
        """What is kept when the last block's forward is over."""
        sizes = self._sizes
        return sizes.dense_layers * self.kept(False) + sizes.moe_layers * self.kept(True) + self.ends()

    def stashes(self) -> int:
        """Of that, what communication-aware recomputation keeps of all blocks."""
        return self._sizes.dense_layers * self.stash(False) + self._sizes.moe_layers * self.stash(True)
