"""Layers as the planner knows them: the sizes of a module that decide what it keeps, sends and computes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_tex.layers import (
    ColumnParallelLinear,
    ParallelAttention,
    ParallelMLP,
    RMSNorm,
    RowParallelLinear,
    VocabParallelCrossEntropy,
    VocabParallelEmbedding,
    VocabParallelHead,
    VocabParallelLinearCrossEntropy,
)
from lightning_tex.layers.qk_norm import HeadNorm, ShardedRMSNorm
from lightning_tex.moe import MoE


@dataclass(frozen=True)
class Embedding:
    """A :class:`VocabParallelEmbedding`: [..] -> [.., dim]."""

    vocab_size: int
    dim: int


@dataclass(frozen=True)
class Norm:
    """A norm over the last dim: [.., dim] -> [.., dim]."""

    dim: int


@dataclass(frozen=True)
class Attention:
    """A :class:`ParallelAttention`: [.., dim] -> [.., dim].

    ``head_norms``, ``full_norms``: queries and keys are normed by head, or over all heads together. ``plain``: what it
    keeps has a formula.
    """

    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_norms: bool
    full_norms: bool
    plain: bool

    @property
    def inner(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True)
class Mlp:
    """A :class:`ParallelMLP`; ``gated``: three matrices in place of two."""

    dim: int
    hidden: int
    gated: bool


@dataclass(frozen=True)
class Moe:
    """A :class:`MoE` layer; ``routing_losses``: whether it has any, ``z_loss``: whether one of them is of logits."""

    dim: int
    hidden: int
    gated: bool
    num_experts: int
    top_k: int
    capacity_factor: float | None
    norm_topk_prob: bool
    routing_losses: bool
    z_loss: bool
    round_factor: float | None


@dataclass(frozen=True)
class Head:
    """A :class:`VocabParallelHead`: [.., dim] -> [.., vocab_size]."""

    dim: int
    vocab_size: int
    gather_output: bool


@dataclass(frozen=True)
class CrossEntropy:
    """A :class:`VocabParallelCrossEntropy`."""


@dataclass(frozen=True)
class LinearCrossEntropy:
    """A :class:`VocabParallelLinearCrossEntropy`, of the one head that there is."""


@dataclass(frozen=True)
class ColumnLinear:
    """A :class:`ColumnParallelLinear`: [.., in_features] -> [.., out_features / tensor]."""

    in_features: int
    out_features: int
    gather_output: bool


@dataclass(frozen=True)
class RowLinear:
    """A :class:`RowParallelLinear`: [.., in_features / tensor] -> [.., out_features]."""

    in_features: int
    out_features: int


@dataclass(frozen=True)
class Linear:
    """A ``torch.nn.Linear``, which every rank computes whole."""

    in_features: int
    out_features: int


@dataclass(frozen=True)
class Other:
    """A module with parameters of its own of which only these are known."""

    kind: str


Loss = CrossEntropy | LinearCrossEntropy
Layer = Embedding | Norm | Attention | Mlp | Moe | Head | Loss | ColumnLinear | RowLinear | Linear | Other


def known_layer(module: nn.Module) -> Layer | None:
    """The layer that a module is, the modules inside it included; ``None`` for what only holds others."""
    match module:
        case VocabParallelEmbedding():
            return Embedding(module.size, module.dim)
        case RMSNorm():
            return Norm(module.normalized_shape[-1])
        case ParallelAttention():
            full_norms = isinstance(module.query_norm, ShardedRMSNorm)
            return Attention(
                module.query.in_features, module.num_heads, module.num_kv_heads, module.head_dim,
                isinstance(module.query_norm, HeadNorm), full_norms, module.clip_qkv is None and not full_norms,
            )  # fmt: skip
        case ParallelMLP():
            return Mlp(module.up.in_features, module.hidden_dim, module.gate is not None)
        case MoE():
            losses = bool(module.load_balance_coefficient or module.z_loss_coefficient)
            return Moe(
                module.router.dim, module.hidden_dim, module.experts.gate is not None, module.num_experts,
                module.top_k, module.capacity_factor, module.router.norm_topk_prob, losses,
                bool(module.z_loss_coefficient), module.round_factor,
            )  # fmt: skip
        case VocabParallelHead():
            return Head(module.dim, module.size, module.gather_output)
        case VocabParallelCrossEntropy():
            return CrossEntropy()
        case VocabParallelLinearCrossEntropy():
            return LinearCrossEntropy()
        case ColumnParallelLinear():
            return ColumnLinear(module.in_features, module.out_features, module.gather_output)
        case RowParallelLinear():
            return RowLinear(module.in_features, module.out_features)
        case nn.Linear():
            return Linear(module.in_features, module.out_features)
    return Other(type(module).__name__) if any(True for _ in module.parameters(recurse=False)) else None
