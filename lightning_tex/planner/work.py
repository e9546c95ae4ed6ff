"""Arithmetic of a step: products as 2 m n k each, and the bytes that everything else reads and writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from lightning_tex.planner.cluster import Cluster
from lightning_tex.planner.layers import (
    Attention,
    ColumnLinear,
    CrossEntropy,
    Head,
    LatentAttention,
    Layer,
    Linear,
    LinearCrossEntropy,
    Loss,
    Mlp,
    Moe,
    Norm,
    RowLinear,
)
from lightning_tex.planner.layouts import Candidate, Job
from lightning_tex.planner.micro_step import MicroStep
from lightning_tex.planner.model import PlacedLayer


class Product(NamedTuple):
    """``batch`` products [m, k] x [k, n].

    Args:
        recorded: what comes of it goes to a collective only: communication-aware recomputation leaves it out.
        last: comes after all that its layer keeps: a recomputation that ends with the layer leaves it out.
        full_precision: computed in fp32.
        backward: products of that size in the backward, one of them for the matrix's gradient; attention's kernel
            computes the scores once more.
        attention: of attention's kernel.
    """

    m: float
    n: float
    k: float
    batch: float = 1
    recorded: bool = False
    last: bool = False
    full_precision: bool = False
    backward: float = 2.0
    attention: bool = False

    @property
    def flops(self) -> float:
        return 2 * self.batch * self.m * self.n * self.k

    def seconds(self, cluster: Cluster, precision: str, element_bytes: int) -> float:
        """By arithmetic or by memory, whichever takes longer."""
        kind, size = ("32-true", 4) if self.full_precision else (precision, element_bytes)
        reached = cluster.product_flops(kind, min(self.m, self.n, self.k))
        arithmetic = self.flops / (cluster.attention_flops(kind) if self.attention else reached)
        moved = self.batch * (self.m * self.k + self.k * self.n + self.m * self.n) * size
        return max(arithmetic, moved / cluster.memory_bandwidth)


@dataclass(frozen=True)
class Work:
    """What one rank computes in the forward of one micro-step, layer by layer.

    Args:
        step: its numbers.
    """

    step: MicroStep

    def products(self, layer: Layer) -> Iterator[Product]:
        """The products of a layer."""
        tokens, tensor = self.step.tokens, self.step.layout.tensor
        match layer:
            case Attention():
                yield from self._attention(layer)
            case LatentAttention():
                yield from self._latent_attention(layer)
            case Mlp():
                yield from self._mlp(layer)
            case Moe():
                if layer.shared is not None:
                    yield from self._mlp(layer.shared)
                yield from self._moe(layer)
            case Head():
                yield Product(tokens, self.step.columns(layer), layer.dim)
            case ColumnLinear():
                yield Product(tokens, layer.out_features / tensor, layer.in_features)
            case RowLinear():
                yield Product(tokens, layer.out_features, layer.in_features / tensor, recorded=tensor > 1)
            case Linear():
                yield Product(self.step.held, layer.out_features, layer.in_features)

    def _attention(self, layer: Attention) -> Iterator[Product]:
        """Projections, then scores and mix of each head over the part of the square that is seen."""
        tokens, tensor = self.step.tokens, self.step.layout.tensor
        d, inner, kv = layer.dim, layer.inner, layer.num_kv_heads * layer.head_dim
        yield Product(tokens, inner / tensor, d)
        yield Product(tokens, 2 * kv / tensor, d)
        length, heads = self.step.job.sequence_length, self.step.sequences * layer.num_heads / tensor
        seen = layer.seen(length)
        yield Product(length, seen, layer.head_dim, heads, backward=2.5, attention=True)
        yield Product(length, layer.head_dim, seen, heads, backward=2.5, attention=True)
        yield Product(tokens, d, inner / tensor, recorded=tensor > 1)

    def _latent_attention(self, layer: LatentAttention) -> Iterator[Product]:
        """Latents of the tokens held here, the heads' projections, and the same scores and mix."""
        tokens, tensor, length = self.step.tokens, self.step.layout.tensor, self.step.job.sequence_length
        for width, made in layer.latents:
            yield Product(self.step.held, made, width)
        for width, made in layer.columns:
            yield Product(tokens, made / tensor, width)
        heads = self.step.sequences * layer.num_heads / tensor
        yield Product(length, length / 2, layer.head_dim, heads, backward=2.5, attention=True)
        yield Product(length, layer.v_head_dim, length / 2, heads, backward=2.5, attention=True)
        yield Product(tokens, layer.dim, layer.num_heads * layer.v_head_dim / tensor, recorded=tensor > 1)

    def _mlp(self, layer: Mlp) -> Iterator[Product]:
        tokens, tensor = self.step.tokens, self.step.layout.tensor
        yield Product(tokens, layer.matrices_up * layer.hidden / tensor, layer.dim)
        yield Product(tokens, layer.dim, layer.hidden / tensor, recorded=tensor > 1)

    def _moe(self, layer: Moe) -> Iterator[Product]:
        here = layer.num_experts / self.step.layout.expert
        hidden = layer.hidden / self.step.layout.expert_tensor
        rows = self.step.rows(layer) / here
        yield Product(self.step.held, layer.scored, layer.dim, full_precision=True)
        yield Product(rows, layer.matrices_up * hidden, layer.dim, here)
        yield Product(rows, layer.dim, hidden, here, recorded=self.step.moved(layer), last=True)

    # --- bytes that everything but products reads and writes, as the layers' code does it

    def moved_bytes(self, layer: Layer) -> float:
        """Of a layer's forward; of its backward twice as many."""
        match layer:
            case Norm():
                return 2 * self._stream(layer.dim)
            case Attention():
                return self._attention_bytes(layer)
            case LatentAttention():
                return self._latent_bytes(layer)
            case Mlp():
                return self._mlp_bytes(layer)
            case Moe():
                return self._moe_bytes(layer) + (0 if layer.shared is None else self._mlp_bytes(layer.shared))
        return 0

    def _stream(self, dim: int) -> int:
        return self.step.held * dim * self.step.element_bytes

    def _attention_bytes(self, layer: Attention) -> float:
        """Rotation of queries and keys (three passes), norms before it, the kernel, and the residual."""
        per_head = self.step.tokens * layer.head_dim / self.step.layout.tensor * self.step.element_bytes
        heads = layer.num_heads + layer.num_kv_heads
        norms = 2 * per_head * heads if layer.head_norms else 0
        return 5 * per_head * heads + per_head * 2 * heads + norms + 3 * self._stream(layer.dim)

    def _latent_bytes(self, layer: LatentAttention) -> float:
        """Latents put together, heads put together (queries and keys), the kernel, and the residual."""
        of_heads = self.step.tokens * layer.num_heads / self.step.layout.tensor * self.step.element_bytes
        return (
            2 * self._stream(layer.entering)
            + of_heads * (8 * layer.head_dim + 2 * layer.v_head_dim)
            + 3 * (self._stream(layer.dim))
        )

    def _mlp_bytes(self, layer: Mlp) -> float:
        """What stands between the products, and the residual."""
        hidden = self.step.tokens * layer.hidden / self.step.layout.tensor
        return hidden * self.step.element_bytes * (5 if layer.gated else 2) + 3 * self._stream(layer.dim)

    def _moe_bytes(self, layer: Moe) -> float:
        """Router, rows picked (and reordered where they travel), what stands between the products, the sum."""
        step, size, score, dim = self.step, self.step.element_bytes, self.step.score_bytes, layer.dim
        router = step.held * (dim * (size + 2 * score) + 8 * layer.scored * score)
        rows = step.rows(layer)
        own = step.own_tokens(layer) * layer.top_k
        reordered = 4 * rows if step.moved(layer) else 0
        hidden = rows * layer.hidden / step.layout.expert_tensor * size
        between = (3 if layer.gated else 2) * hidden
        return router + (3 * own + reordered) * dim * size + between + 4 * self._stream(dim)

    def loss_bytes(self, layer: Head, loss: Loss) -> float:
        """Of a loss of a head's logits in full precision, forward and backward together."""
        size, score = self.step.element_bytes, self.step.score_bytes
        casts = 2 * (size + score) if size != score else 0
        logits = self.step.tokens * self.step.columns(layer)
        if isinstance(loss, CrossEntropy):
            return logits * (casts + (1 + 2 + 2 + 1 + 2 + 2) * score)
        added = 2 * score * self.step.columns(layer) * layer.dim * len(self.step.loss_chunks(layer, "cuda"))
        return logits * (casts + (1 + 2 + 2 + 1 + 2) * score) + added


class LayerTime(NamedTuple):
    """Seconds of one layer in one micro-step, and the FLOPs of all its passes."""

    forward: float
    recompute: float
    backward: float
    flops: float


@dataclass(frozen=True)
class Computation:
    """Seconds of one micro-step on one rank.

    Args:
        forward, recompute, backward: by pass.
        flops: that a rank computes, all passes.
        forward_of_parts: forward of each of the model's ``backward_parts``.
        backward_of_parts: backward and recomputation of each of them.
    """

    forward: float
    recompute: float
    backward: float
    flops: float
    forward_of_parts: tuple[float, ...]
    backward_of_parts: tuple[float, ...]

    @property
    def total(self) -> float:
        return self.forward + self.recompute + self.backward


def computation(job: Job, candidate: Candidate, cluster: Cluster) -> Computation:
    """Roofline time of all that one rank computes in a micro-step; a backward is two forwards, attention's 2.5."""
    model, work = job.model, Work(MicroStep(job, candidate))
    loss = next((placed.layer for placed in model.layers if isinstance(placed.layer, Loss)), None)
    of_placed = {placed: _layer_time(work, placed, cluster, loss) for placed in model.layer_counts}
    times = {(placed.layer, placed.in_block): time for placed, time in of_placed.items()}
    forward = recompute = backward = flops = 0.0
    for placed, count in model.layer_counts.items():
        time = of_placed[placed]
        forward += count * time.forward
        recompute += count * time.recompute
        backward += count * time.backward
        flops += count * time.flops
    kinds, order = model.backward_parts.kinds, model.backward_parts.order
    forward_of = [sum(times[placed].forward for placed in part) for part in kinds]
    backward_of = [sum(times[placed].recompute + times[placed].backward for placed in part) for part in kinds]
    of_parts = (tuple(of_kind[kind] for kind in order) for of_kind in (forward_of, backward_of))
    return Computation(forward, recompute, backward, flops, *of_parts)


def _layer_time(work: Work, placed: PlacedLayer, cluster: Cluster, loss: Loss | None) -> LayerTime:
    layer, in_block = placed.layer, placed.in_block
    job, mode = work.step.job, work.step.candidate.activation_checkpointing
    products = [_without_gradient(one) if placed.frozen else one for one in work.products(layer)]
    seconds = [product.seconds(cluster, job.precision, work.step.element_bytes) for product in products]
    rest = cluster.passes(work.moved_bytes(layer))
    forward = sum(seconds) + rest
    backward = sum(product.backward * time for product, time in zip(products, seconds, strict=True)) + 2 * rest
    flops = sum((1 + product.backward) * product.flops for product in products)
    if isinstance(layer, Head) and loss is not None:
        of_loss = cluster.passes(work.loss_bytes(layer, loss))
        if isinstance(loss, LinearCrossEntropy):  # whose forward makes the gradients
            return LayerTime(forward + backward + of_loss, 0.0, 0.0, flops)
        forward, backward = forward + of_loss / 2, backward + of_loss / 2
    if not in_block or mode is None:
        return LayerTime(forward, 0.0, backward, flops)
    replayed = mode == "communication_aware"
    again = [not ((replayed and product.recorded) or (placed.ends_block and product.last)) for product in products]
    recompute = sum(time for time, repeated in zip(seconds, again, strict=True) if repeated) + rest
    flops += sum(product.flops for product, repeated in zip(products, again, strict=True) if repeated)
    return LayerTime(forward, recompute, backward, flops)


def _without_gradient(product: Product) -> Product:
    return product if product.attention else product._replace(backward=product.backward - 1)
