"""Arithmetic of a step: products as 2 m n k each, and the bytes that everything else reads and writes.

Model FLOPs are three forwards (a forward, and a backward of twice that) of every product on whole matrices, attention
over whole squares: what MFU is usually measured by. What a rank computes besides (recomputation, equal work on tensor
ranks, imbalance) takes time and is no model FLOP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from lightning_tex.planner.activations import Activations
from lightning_tex.planner.cluster import Cluster
from lightning_tex.planner.layouts import Candidate, Job
from lightning_tex.planner.sizes import ModelSizes


class Product(NamedTuple):
    """``batch`` products [m, k] x [k, n].

    Args:
        recorded: what comes of it goes to a collective only: communication-aware recomputation leaves it out.
        full_precision: computed in fp32.
        backward: products of that size in the backward; attention's kernel computes the scores once more.
        attention: of attention's kernel.
    """

    m: float
    n: float
    k: float
    batch: float = 1
    recorded: bool = False
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
    """What one rank computes in the forward of one micro-step, part by part.

    Args:
        at: its activations, of a job and a candidate.
    """

    at: Activations

    @property
    def _sizes(self) -> ModelSizes:
        return self.at.job.sizes

    def attention(self) -> Iterator[Product]:
        """Projections, then scores and mix of each head over the half of the square that is seen."""
        sizes, tokens, tensor = self._sizes, self.at.tokens, self.at.candidate.layout.tensor
        d, kv = sizes.dim, sizes.kv_heads * sizes.head_dim
        yield Product(tokens, d / tensor, d)
        yield Product(tokens, 2 * kv / tensor, d)
        length, heads = self.at.job.sequence_length, self.at.candidate.micro_batch * sizes.num_heads / tensor
        yield Product(length, length / 2, sizes.head_dim, heads, backward=2.5, attention=True)
        yield Product(length, sizes.head_dim, length / 2, heads, backward=2.5, attention=True)
        yield Product(tokens, d, d / tensor, recorded=tensor > 1)

    @property
    def _ups(self) -> int:
        return 2 if self._sizes.activation == "swiglu" else 1

    def mlp(self) -> Iterator[Product]:
        sizes, tokens, tensor = self._sizes, self.at.tokens, self.at.candidate.layout.tensor
        yield Product(tokens, self._ups * sizes.hidden / tensor, sizes.dim)
        yield Product(tokens, sizes.dim, sizes.hidden / tensor, recorded=tensor > 1)

    def moe(self) -> Iterator[Product]:
        sizes, layout, at = self._sizes, self.at.candidate.layout, self.at
        here = sizes.num_experts / layout.expert
        hidden = sizes.hidden / layout.expert_tensor
        yield Product(at.held, sizes.num_experts, sizes.dim, full_precision=True)
        yield Product(at.rows / here, self._ups * hidden, sizes.dim, here)
        yield Product(at.rows / here, sizes.dim, hidden, here, recorded=True)

    def head(self) -> Iterator[Product]:
        at = self.at
        yield Product(at.tokens, at.columns, self._sizes.dim)

    # --- bytes that everything but products reads and writes, as the layers' code does it

    def norm_bytes(self) -> float:
        """Upcast, norm, downcast where the weight has another dtype."""
        at = self.at
        size, full = self.at.job.element_bytes, at._norm_bytes
        casts = 2 * (size + full) if size != full else 0
        return at.held * self._sizes.dim * (2 * full + casts)

    def attention_bytes(self) -> float:
        """Rotation of queries and keys (four passes), the kernel, and the residual."""
        sizes, at, size = self._sizes, self.at, self.at.job.element_bytes
        per_head = at.tokens * sizes.head_dim / self.at.candidate.layout.tensor * size
        rotation = 9 * per_head * (sizes.num_heads + sizes.kv_heads)
        kernel = per_head * 2 * (sizes.num_heads + sizes.kv_heads)
        return rotation + kernel + 3 * at.stream

    def mlp_bytes(self) -> float:
        at = self.at
        hidden = at.tokens * self._sizes.hidden / self.at.candidate.layout.tensor
        return self._between_bytes(hidden) + 3 * at.stream

    def _between_bytes(self, hidden: float) -> float:
        return hidden * self.at.job.element_bytes * (2 if self._sizes.activation == "gelu" else 5)

    def moe_bytes(self) -> float:
        """Router, rows picked and reordered on both ways, what stands between the products, the weighted sum."""
        sizes, at, size = self._sizes, self.at, self.at.job.element_bytes
        score, dim = at.score_bytes, sizes.dim
        router = at.held * (dim * (size + score) + 8 * sizes.num_experts * score)
        hidden = at.rows * sizes.hidden / self.at.candidate.layout.expert_tensor
        rows = at.rows * dim * size * 2 * 2
        home = at._own_tokens * sizes.top_k * dim
        picked = 2 * at.stream + 2 * home * size * 2
        weighted = home * (size + 2 * score) + at.held * dim * (score + size)
        return router + rows + picked + weighted + self._between_bytes(hidden) + 3 * at.stream

    def loss_bytes(self) -> float:
        """Cross-entropy of the logits in full precision, forward and backward together."""
        at = self.at
        size, score = self.at.job.element_bytes, at.score_bytes
        casts = 2 * (size + score) if size != score else 0
        return at.tokens * at.columns * (casts + (1 + 2 + 2 + 1 + 2 + 2) * score)


@dataclass(frozen=True)
class Computation:
    """Seconds of one micro-step on one rank.

    Args:
        forward, recompute, backward: by pass.
        flops: that a rank computes, all passes.
        parts: backward and recomputation of the head, of one attention, of one dense MLP, of one MoE layer.
    """

    forward: float
    recompute: float
    backward: float
    flops: float
    parts: tuple[float, float, float, float]

    @property
    def total(self) -> float:
        return self.forward + self.recompute + self.backward


def computation(job: Job, candidate: Candidate, cluster: Cluster) -> Computation:
    """Roofline time of all that one rank computes in a micro-step; a backward is two forwards, attention's 2.5."""
    work, sizes = Work(Activations(job, candidate)), job.sizes
    forward = again = backward = flops = 0.0
    parts = (
        (sizes.num_layers, list(work.attention()), work.attention_bytes() + work.norm_bytes()),
        (sizes.dense_layers, list(work.mlp()), work.mlp_bytes() + work.norm_bytes()),
        (sizes.moe_layers, list(work.moe()) if sizes.moe_layers else [],
         work.moe_bytes() + work.norm_bytes() if sizes.moe_layers else 0),
    )  # fmt: skip
    replays = candidate.activation_checkpointing == "communication_aware"
    blocks: list[float] = []
    for times, products, moved in parts:
        time = [p.seconds(cluster, job.precision, job.element_bytes) for p in products]
        repeated = [not (replays and p.recorded) for p in products]
        rest = cluster.passes(moved)
        forward += times * (sum(time) + rest)
        back = sum(p.backward * t for p, t in zip(products, time, strict=True)) + 2 * rest
        backward += times * back
        flops += times * sum((1 + p.backward) * p.flops for p in products)
        if candidate.activation_checkpointing is not None:
            once_more = sum(t for t, r in zip(time, repeated, strict=True) if r) + rest
            again += times * once_more
            back += once_more
            flops += times * sum(p.flops for p, r in zip(products, repeated, strict=True) if r)
        blocks.append(back)
    head = list(work.head())
    last = sum(p.seconds(cluster, job.precision, job.element_bytes) for p in head)
    last += cluster.passes(work.norm_bytes())
    flops += 3 * sum(p.flops for p in head)
    loss = cluster.passes(work.loss_bytes())
    end, (attention, mlp, moe) = 2 * last + loss / 2, blocks
    return Computation(forward + last + loss / 2, again, backward + end, flops, (end, attention, mlp, moe))


def model_flops(job: Job) -> float:
    """FLOPs of one optimizer step over all ranks: three forwards of every product, attention over whole squares."""
    sizes, tokens = job.sizes, job.tokens
    ups = 2 if sizes.activation == "swiglu" else 1
    d, kv, h = sizes.dim, sizes.kv_heads * sizes.head_dim, sizes.hidden
    attention = 2 * tokens * (2 * d * d + 2 * d * kv) + 2 * 2 * tokens * job.sequence_length * d
    mlp = 2 * tokens * (ups + 1) * d * h
    moe = mlp * sizes.top_k + 2 * tokens * d * sizes.num_experts
    head = 2 * tokens * d * sizes.vocab_size
    return 3.0 * (sizes.num_layers * attention + sizes.dense_layers * mlp + sizes.moe_layers * moe + head)


def paper_flops(batch: float, length: float, layers: float, width: float, vocabulary: float) -> float:
    """F = 96 B s l h^2 (1 + s/6h + V/16lh): FLOPs of a batch with full recomputation (the paper, after Megatron-LM)."""
    return 96 * batch * length * layers * width**2 * (1 + length / (6 * width) + vocabulary / (16 * layers * width))
