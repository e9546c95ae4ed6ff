"""Layers as the planner knows them: the sizes of a module that decide what it keeps, sends and computes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_tex.layers import (
    ColumnParallelLinear,
    LayerNorm,
    ParallelAttention,
    ParallelLatentAttention,
    ParallelMLP,
    RMSNorm,
    RowParallelLinear,
    VocabParallelCrossEntropy,
    VocabParallelEmbedding,
    VocabParallelHead,
    VocabParallelLinearCrossEntropy,
)
from lightning_tex.layers.qk_norm import HeadNorm, ShardedRMSNorm
from lightning_tex.moe import (
    MoE,
    Router,
    SoftmaxRouter,
)
from lightning_tex.moe.experts import Experts
from lightning_tex.planner.deciding import Deciding


@dataclass(frozen=True)
class Embedding:
    """A :class:`VocabParallelEmbedding`: [..] -> [.., dim]."""

    vocab_size: int
    dim: int


@dataclass(frozen=True)
class Norm:
    """A norm over the last dim: [.., dim] -> [.., dim]; ``plain``: what it keeps has a formula."""

    dim: int
    plain: bool = True


@dataclass(frozen=True)
class Attention:
    """A :class:`ParallelAttention`: [.., dim] -> [.., dim].

    ``head_norms``, ``full_norms``: queries and keys are normed by head, or over all heads together. ``window``: how
    many positions each sees. ``plain``: what it keeps has a formula.
    """

    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_norms: bool
    full_norms: bool
    window: int | None
    plain: bool

    def seen(self, length: int) -> float:
        """Positions that one of a sequence sees in the mean, where none sees what comes later."""
        window = length if self.window is None else min(self.window, length)
        return window - window**2 / (2 * length)

    @property
    def inner(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True)
class LatentAttention:
    """A :class:`ParallelLatentAttention`: [.., dim] -> [.., dim].

    ``entering``: width of what enters the sharded region. ``latents``: (in, out) of the products before it, whole on
    every rank. ``columns``: of those within. ``head_dim``, ``v_head_dim``: widths of a head's keys, and of its values.
    """

    dim: int
    num_heads: int
    head_dim: int
    v_head_dim: int
    entering: int
    latents: tuple[tuple[int, int], ...]
    columns: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Mlp:
    """A :class:`ParallelMLP`; ``gated``: three matrices in place of two. ``plain``: what it keeps has a formula."""

    dim: int
    hidden: int
    gated: bool
    plain: bool

    @property
    def matrices_up(self) -> int:
        """Matrices [dim, hidden] before the activation."""
        return 2 if self.gated else 1


@dataclass(frozen=True)
class Moe:
    """A :class:`MoE` layer; ``routing_losses``: whether it has any, ``z_loss``: whether one of them is of logits.

    ``shared``: the MLP that every token uses; ``shared_gate``: whether its result is scaled, and kept for that.
    ``plain``: what it keeps has a formula. ``sequence_balance``: whether there is a loss of each sequence by itself;
    ``entropy_loss``: whether there is one of entropies. ``free``: experts that compute nothing; every choice is taken
    to be of one that does.
    """

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
    shared: Mlp | None
    shared_gate: bool
    plain: bool
    deciding: Deciding
    sequence_balance: bool
    entropy_loss: bool
    min_capacity: int
    overflow_by_score: bool
    free: int

    @property
    def scored(self) -> int:
        """Experts that the router knows."""
        return self.num_experts + self.free

    @property
    def matrices_up(self) -> int:
        """Matrices [dim, hidden] of an expert before the activation."""
        return 2 if self.gated else 1


@dataclass(frozen=True)
class Head:
    """A :class:`VocabParallelHead`: [.., dim] -> [.., vocab_size]; ``plain``: what it keeps has a formula."""

    dim: int
    vocab_size: int
    gather_output: bool
    plain: bool


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
Layer = (
    Embedding | Norm | Attention | LatentAttention | Mlp | Moe | Head | Loss | ColumnLinear | RowLinear | Linear | Other
)


def known_layer(module: nn.Module) -> Layer | None:
    """The layer that a module is, the modules inside it included; ``None`` for what only holds others."""
    match module:
        case VocabParallelEmbedding():
            return Embedding(module.size, module.dim)
        case RMSNorm():
            return Norm(module.normalized_shape[-1])
        case LayerNorm():
            return Norm(module.normalized_shape[-1], plain=False)
        case ParallelLatentAttention():
            return _latent_attention(module)
        case ParallelAttention():
            return _attention(module)
        case ParallelMLP():
            return _mlp(module)
        case MoE():
            dense = module.shared or module.residual
            shared = None if dense is None else _mlp(dense)
            gated = module.shared is not None and module.shared.output_gate is not None
            losses, by_sequence = bool(module.loss_coefficients), bool(module.sequence_balance_coefficient)
            plain = shared is None and module.output_biases is None and _is_plain(module.router)
            by_score = module.capacity is not None and module.capacity.precedence == "score"
            plain = plain and not module.entropy_coefficient and not by_sequence and not by_score
            hidden, has_gate = _expert_sizes(module)
            plain = plain and isinstance(module.experts, Experts) and module.free is None
            return Moe(
                module.router.dim, hidden, has_gate, module.num_experts,
                module.top_k, module.capacity_factor, module.router.norm_topk_prob, losses,
                bool(module.z_loss_coefficient), module.round_factor, shared,
                gated or module.residual is not None, plain,
                Deciding.of(module.router), by_sequence, bool(module.entropy_coefficient),
                0 if module.capacity is None else module.capacity.least, by_score,
                0 if module.free is None else module.free.count,
            )  # fmt: skip
        case VocabParallelHead():
            return Head(module.dim, module.size, module.gather_output, module.softcap is None and module.bias is None)
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


def _attention(module: ParallelAttention) -> Attention:
    norm = None if module.qk_norms is None else module.qk_norms["query"]
    full_norms, scores, rotary = isinstance(norm, ShardedRMSNorm), module.scores, module.rotary
    whole = rotary.width == module.head_dim and not rotary.interleaved
    unusual = full_norms or module.clip_qkv or module.sinks is not None or scores.window or scores.softcap
    return Attention(
        module.query.in_features, module.num_heads, module.num_kv_heads, module.head_dim,
        isinstance(norm, HeadNorm), full_norms, scores.window, whole and not unusual,
    )  # fmt: skip


def _latent_attention(module: ParallelLatentAttention) -> LatentAttention:
    latents = [one for one in (module.query_latent, module.key_value_latent) if one is not None]
    columns = module.query, module.key_value
    return LatentAttention(
        module.dim,
        module.num_heads,
        module.qk_nope_head_dim + module.qk_rope_head_dim,
        module.v_head_dim,
        module.query.in_features + module.key_value_latent.out_features,
        tuple((one.in_features, one.out_features) for one in latents),
        tuple((one.in_features, one.out_features) for one in columns),
    )


def _is_plain(router: Router) -> bool:
    """Whether a router keeps scores, choices and weights, and nothing else."""
    usual = all(getattr(type(router), name) is getattr(Router, name) for name in ("forward", "logits", "weigh"))
    softmax = isinstance(router, SoftmaxRouter) and usual
    return softmax and router.bias is None and router.routed_scaling_factor == 1


def _expert_sizes(module: MoE) -> tuple[int, bool]:
    """Hidden width of an expert, and whether it has a gate; of a user's own as if each parameter multiplied."""
    experts = module.experts
    if isinstance(experts, Experts):
        return experts.hidden_dim, experts.gate is not None
    of_one = sum(parameter[0].numel() for parameter in experts.parameters())
    return max(1, of_one // (2 * experts.dim)), False


def _mlp(module: ParallelMLP) -> Mlp:
    plain = module.activation not in ("relu", "clamped_swiglu")
    return Mlp(module.up.in_features, module.hidden_dim, module.gate is not None, plain)
