"""Bytes that one micro-step's forward keeps for its backward, from what autograd saves in each layer's code.

The formulas hold for blocks that are put together as :class:`lightning_tex.models.Block` is, in a decoder.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lightning_tex.layers.document_context import takes_documents
from lightning_tex.layers.head_gradients import SLICE_BYTES
from lightning_tex.planner.layers import (
    Attention,
    CrossEntropy,
    Embedding,
    Head,
    Layer,
    LinearCrossEntropy,
    Mlp,
    Moe,
    Norm,
)
from lightning_tex.planner.micro_step import MicroStep

_INT64, _INT32 = 8, 4

# T tokens of a data rank's micro-batch, s of them held between layers (T/tensor under sequence parallelism, else T),
# D model width, H hidden width, E experts, k choices per token, N rows at a rank's experts, v columns of the logits


@dataclass(frozen=True)
class Activations:
    """Activations of one rank in one micro-step, in bytes.

    Args:
        step: its numbers.
        device: ``cuda`` or ``cpu``.
    """

    step: MicroStep
    device: str = "cuda"

    def saved(self, layer: Layer) -> int:
        """What a layer's forward keeps without recomputation."""
        match layer:
            case Norm():
                return self._norm(layer)
            case Attention():
                return self._attention(layer)
            case Mlp():
                return self._mlp(layer)
            case Moe():
                return self._router(layer) + self._experts(layer) + self.indices(layer)
            case Embedding():
                return self.step.tokens * _INT64
            case Head():
                return self.whole(layer.dim)
            case CrossEntropy():
                return self.step.tokens * (_INT64 + 1)
            case LinearCrossEntropy():
                return self.step.tokens * (_INT64 + 1 + self.step.score_bytes)
        raise AssertionError(f"no formula for what {layer} keeps")

    def stream(self, dim: int) -> int:
        """Activations between layers: [s, D]."""
        return self.step.held * dim * self.step.element_bytes

    def whole(self, dim: int) -> int:
        """Activations inside a region sharded over tensor, before they are sharded: [T, D]."""
        return self.step.tokens * dim * self.step.element_bytes

    def _norm(self, layer: Norm) -> int:
        """The stream that it is given, and a scale a token."""
        return self.stream(layer.dim) + self.step.held * self.step.score_bytes

    def rotary(self, layer: Attention) -> int:
        """Cosines and sines that all layers have in common; of each sequence where its documents have positions."""
        tables = self.step.tokens if self.step.job.document_mask else self.step.job.sequence_length
        return tables * 3 * layer.head_dim // 2 * self.step.element_bytes

    def _attention(self, layer: Attention) -> int:
        """The input of the projections; what the attention kernel saves, its result included."""
        step, tensor = self.step, self.step.layout.tensor
        heads = 2 * layer.num_heads + 2 * layer.num_kv_heads  # query and result, key and value
        kernel = step.tokens * heads * layer.head_dim // tensor * step.element_bytes
        log_sums = step.tokens * layer.num_heads // tensor * step.score_bytes
        normed = 0
        if layer.head_norms:  # what they are given, and a scale of each head
            per_head = layer.head_dim * step.element_bytes + step.score_bytes
            normed = step.tokens * (layer.num_heads + layer.num_kv_heads) // tensor * per_head
        return self.whole(layer.dim) + kernel + log_sums + normed + self._put_together(layer)

    def _put_together(self, layer: Attention) -> int:
        """Where documents are mixed one after the other for want of a kernel, all results in one besides."""
        step = self.step
        kernel = self.device == "cuda" and step.element_bytes == 2 and takes_documents(layer.head_dim)
        if kernel or not step.job.document_mask:
            return 0
        return step.tokens * layer.inner // step.layout.tensor * step.element_bytes

    def _mlp(self, layer: Mlp) -> int:
        """The input of the first product, and what stands between the products."""
        hidden = self.step.tokens * layer.hidden // self.step.layout.tensor * self.step.element_bytes
        return self.whole(layer.dim) + between(layer) * hidden

    def arrived(self, layer: Moe) -> int:
        """Rows at the experts: [N, D]."""
        return self.step.rows(layer) * layer.dim * self.step.element_bytes

    def home(self, layer: Moe) -> int:
        """What comes home, summed over a token's choices: [t, D]."""
        return self.step.own_tokens(layer) * layer.dim * self.step.element_bytes

    def hidden(self, layer: Moe) -> int:
        """One tensor between the experts' products: [N, H]."""
        return self.step.rows(layer) * layer.hidden // self.step.layout.expert_tensor * self.step.element_bytes

    def _router(self, layer: Moe) -> int:
        """The input, scores and choices, and for the routing losses logits."""
        score = self.step.score_bytes
        per_token = self.step.element_bytes * layer.dim + score * layer.num_experts
        if layer.norm_topk_prob:
            per_token += score * (layer.top_k + 1)
        return self.step.held * per_token + self.choices(layer) + self.routing_losses(layer)

    def choices(self, layer: Moe) -> int:
        """Which experts: [s, k]."""
        return _INT64 * self.step.held * layer.top_k

    def routing_losses(self, layer: Layer) -> int:
        """Logits and one number of each token, for the z-loss; kept in recomputation as well."""
        if not isinstance(layer, Moe) or not layer.z_loss:
            return 0
        return self.step.held * self.step.score_bytes * (layer.num_experts + 1)

    def _experts(self, layer: Moe) -> int:
        """Weights of the rows, what the first products gave, and rows that have travelled; else own tokens."""
        step = self.step
        rows = self.arrived(layer) if step.moved(layer) else self.home(layer) * (step.split > 1)
        products = (2 if layer.gated else 1) * self.hidden(layer)
        return rows + self.row_weights(layer) + products

    def given_back(self, layer: Moe) -> int:
        """What the experts' backward lets go of: but for what is on a tape."""
        step = self.step
        taped = step.candidate.activation_checkpointing == "communication_aware" and step.moved(layer)
        return self._experts(layer) - (self.arrived(layer) + self.row_weights(layer) if taped else 0)

    def row_weights(self, layer: Moe) -> int:
        """Of the rows at the experts: [N]."""
        return self.step.rows(layer) * self.step.score_bytes

    def indices(self, layer: Moe) -> int:
        """What the exchange keeps: which row each choice has and the other way round, and where groups end."""
        step = self.step
        here = layer.num_experts // step.layout.expert
        slots = step.own_tokens(layer) * layer.top_k
        of_experts = _INT64 * layer.num_experts + _INT32 * here
        chunks = len(step.sent_rows(layer))
        of_experts += _INT32 * here * (chunks - 1)
        if step.static(layer):
            whole = layer.num_experts * step.capacity_rows(layer)
            # Where it is neither split nor in chunks, with its last.
            rows = whole + 1 if step.split == chunks == 1 else whole // step.split
            return _INT64 * (slots * chunks + rows) + of_experts
        regrouped = 2 * step.rows(layer) if here > 1 and step.layout.expert * step.gather > 1 else 0
        return _INT64 * (slots + step.chosen_rows(layer) + regrouped) + of_experts

    def decisions(self, layer: Layer) -> int:
        """What a recomputation does not decide again."""
        if not isinstance(layer, Moe):
            return 0
        overflowed = 0
        if layer.capacity_factor is not None:  # how many choices do, or which
            overflowed = self.step.held * layer.top_k if self.step.communication.sequence_parallel else _INT64
        return self.choices(layer) + self.indices(layer) + overflowed

    # --- blocks

    def block(self, layers: Iterable[Layer]) -> int:
        """Everything that a block keeps without recomputation."""
        return sum(map(self.saved, layers))

    def stash(self, layers: Iterable[Layer]) -> int:
        """What communication-aware recomputation keeps of a block's collectives."""
        if self.step.candidate.activation_checkpointing != "communication_aware":
            return 0
        return sum(map(self._stashed, layers))

    def _stashed(self, layer: Layer) -> int:
        match layer:
            case Attention() | Mlp():
                sharded = self.step.layout.tensor > 1
                enter = self.whole(layer.dim) if sharded and self.step.candidate.sequence_parallel else 0
                return enter + (self.stream(layer.dim) if sharded else 0)
            case Moe():
                together = self.whole(layer.dim) if self.step.split > 1 and not self.step.static(layer) else 0
                return self.exchanged(layer) + together
        return 0

    def exchanged(self, layer: Moe) -> int:
        """Rows and their weights at the experts, and the sums at home, where anything passes between ranks."""
        if not self.step.moved(layer):
            return 0
        return self.arrived(layer) + self.row_weights(layer) + self.home(layer)

    def kept(self, layers: tuple[Layer, ...]) -> int:
        """What is left of a block when its forward is over, without the stash."""
        if self.step.candidate.activation_checkpointing is None:
            return self.block(layers)
        return self.stream(width(layers)) + sum(self.routing_losses(each) + self.decisions(each) for each in layers)

    # --- both ends

    def vocabulary(self, layer: Embedding | Head) -> int:
        """The own part of the embedding or the head."""
        return self.step.columns(layer) * layer.dim * self.step.element_bytes

    def logits(self, layer: Head) -> int:
        """The most that logits take at once: themselves, in full precision, and their softmax or gradient."""
        size, score = self.step.element_bytes, self.step.score_bytes
        copies = 2 * score if score == size else 2 * score + size
        return self.step.tokens * self.step.columns(layer) * copies

    def head_backward(self, layer: Head) -> int:
        """Gradients of the logits, of the head's matrix and of its input."""
        logits = self.step.tokens * self.step.columns(layer) * self.step.element_bytes
        return logits + self.vocabulary(layer) + self.whole(layer.dim)

    def linear_loss(self, layer: Head, device: str) -> int:
        """A chunk's logits and their exponentials, and the gradients of the head's matrix and input."""
        size, score, chunks = self.step.element_bytes, self.step.score_bytes, self.step.loss_chunks(layer, device)
        logits = max(chunks) * self.step.columns(layer) * (score if score == size else score + size)
        added = min(SLICE_BYTES, self.vocabulary(layer)) if self._added_apart(layer, device) else 0
        return logits + added + self._matrix_sums(layer, device) + self.whole(layer.dim)

    def linear_loss_backward(self, layer: Head, device: str) -> int:
        """The same gradients, and that of the matrix in its dtype."""
        sums, vocabulary = self._matrix_sums(layer, device), self.vocabulary(layer)
        return sums + (vocabulary if sums > vocabulary else 0) + self.whole(layer.dim)

    def _matrix_sums(self, layer: Head, device: str) -> int:
        """The gradient of the head's matrix, of several chunks in full precision."""
        several = len(self.step.loss_chunks(layer, device)) > 1
        return self.step.columns(layer) * layer.dim * (self.step.score_bytes if several else self.step.element_bytes)

    def _added_apart(self, layer: Head, device: str) -> bool:
        """Whether a chunk's part of that gradient is computed before it is added."""
        return device == "cpu" and self._matrix_sums(layer, device) > self.vocabulary(layer)

    def embedding_backward(self, layer: Embedding) -> int:
        """Gradients of the stream and of the embedding."""
        return self.stream(layer.dim) + self.vocabulary(layer)


def between(layer: Mlp) -> int:
    """Tensors of hidden width: gelu's input and result; of swiglu both products, silu's result and the product."""
    return 4 if layer.gated else 2


def width(layers: tuple[Layer, ...]) -> int:
    """D of a block."""
    first = layers[0]
    assert isinstance(first, (Norm, Attention, Mlp, Moe)), first
    return first.dim
