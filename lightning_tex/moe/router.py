"""Which experts each token goes to, and with what weight."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_tex.moe.choice import largest
from lightning_tex.moe.group_limit import GroupLimit, GroupScore
from lightning_tex.moe.steps import ActsAfterStep
from lightning_tex.moe.tokens import Tokens
from lightning_tex.parallel.autocast import autocast_off
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.initialization import by_index, init_uniform_
from lightning_tex.parallel.replay import decided
from lightning_tex.parallel.sharding import TexModule

# T tokens, D model width, E experts, k choices per token

# Added to a sum of scores before it divides: all of a sigmoid's may be 0.
_LEAST = 1e-20


class Route(NamedTuple):
    """A router's decision.

    indices: [T, k] int64, the chosen experts, best first; E where the token is masked out.
    weights: [T, k], what the chosen experts' outputs are multiplied with; 0 where masked.
    scores:  [T, E], non-negative, rows sum to 1: what the load-balance loss pushes on.
    logits:  [T, E], what the z-loss pushes on.
    priority: [T], of tokens that compete for an expert's capacity those with more come first; ``None``: in their order.
    """

    indices: Tensor
    weights: Tensor
    scores: Tensor
    logits: Tensor
    priority: Tensor | None = None


class _FullPrecisionLinear(torch.autograd.Function):
    """``x @ weight.mT`` in fp32, or fp64 of fp64, of which x is kept as it is and not as it is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        ctx.save_for_backward(x, weight)
        return F.linear(x.to(dtype), weight.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        with autocast_off(grad):
            d_x = (grad @ weight.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
            d_weight = (grad.mT @ x.to(grad.dtype)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return d_x, d_weight


def full_precision_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.mT`` in fp32, or fp64 of fp64, whatever x is kept in."""
    product: Tensor = _FullPrecisionLinear.apply(x, weight)
    return product


class Router(TexModule, ActsAfterStep):
    """Base of all routers: linear logits in fp32, scores, top-k, weights.

    A subclass defines :meth:`score`, and may define :meth:`logits`, :meth:`prefer`, :meth:`choose`, :meth:`weigh` and
    :meth:`balance`, or all of :meth:`forward`. Ranks of one tensor group hold the same tokens and must decide alike:
    the decision of tensor rank 0 is theirs. Indices come from detached scores, and in a recomputation from its tape:
    what is chosen is chosen once (:meth:`decide`). Of equal scores the lowest expert's comes first.

    Class attributes that a subclass may declare:
        tokenwise: in evaluation a token's choices are of that token alone, whatever other tokens there are; where they
            are not, nothing is generated.
        experts_choose: whether experts take tokens, so that a token may have all of them and has ``top_k`` on average,
            a column of ``indices`` for each expert; nothing overflows then.
        needs_ids: whether :class:`Tokens` must have ``ids``.
        learned: whether there are logits of learned weights; without, a subclass defines all of :meth:`forward`.

    Args:
        dim: model width D.
        num_experts: E.
        top_k: choices per token, k.
        norm_topk_prob: rescale a token's k weights to sum to 1.
        bias: add a bias to the logits.
        routed_scaling_factor: weights are multiplied with it, last.
        n_group: experts are in so many groups, of which a token uses few (:class:`GroupLimit`); ``None``: in one.
        topk_group: how many of them.
        group_score: ``"max"``: a group is as good as its best expert; ``"top2_sum"``: as its best two.

    Raises:
        ValueError: ``top_k`` outside 1..num_experts, or groups that there cannot be.
    """

    axes = ("tensor", "data")
    full_precision = True

    group_score: ClassVar[GroupScore] = "max"
    tokenwise: ClassVar[bool] = True
    experts_choose: ClassVar[bool] = False
    needs_ids: ClassVar[bool] = False
    learned: ClassVar[bool] = True
    weight: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 1,
        norm_topk_prob: bool = False,
        *,
        bias: bool = False,
        routed_scaling_factor: float = 1.0,
        n_group: int | None = None,
        topk_group: int | None = None,
        group_score: GroupScore | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise UserValueError(f"top_k={top_k} must be between 1 and num_experts={num_experts}")
        self.dim, self.num_experts, self.top_k, self.norm_topk_prob = dim, num_experts, top_k, norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.source: Callable[[str, Callable[[], Tensor]], Tensor] | None = None  # of decisions, in place of choosing
        self.groups = None
        if n_group is not None and n_group > 1:
            self.groups = GroupLimit(n_group, topk_group or n_group, group_score or self.group_score)
            self.groups.require(num_experts, top_k)
        self.register_parameter("weight", nn.Parameter(torch.empty(num_experts, dim)) if self.learned else None)
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None
        self.reset_parameters()

    @by_index
    def reset_parameters(self) -> None:
        """Draw as ``torch.nn.Linear`` does: uniform within 1/sqrt(dim)."""
        boxes = self.boxes()
        for name, parameter in self.named_parameters(recurse=False):
            init_uniform_(parameter, 1 / math.sqrt(self.dim), boxes[name])

    @abstractmethod
    def score(self, logits: Tensor) -> Tensor:  # [T, E] -> [T, E]
        """Non-negative scores from logits."""
        raise NotImplementedError

    def forward(self, x: Tensor, tokens: Tokens | None = None) -> Route:
        """Route tokens.

        Args:
            x: [T, D], any floating dtype; computed in fp32, or fp64 for fp64.
            tokens: what else is known of them; ``None``: nothing.
        """
        tokens = tokens or Tokens()
        with autocast_off(x):
            logits = self.logits(x, tokens)
            scores = self.score(logits)
            indices = self.decide("the choice of experts", lambda: self.choose(scores.detach(), tokens))
            weights = self.weigh(logits, scores, indices)
            if tokens.mask is not None:
                indices = indices.masked_fill(~tokens.mask[:, None], self.num_experts)
                weights = weights.masked_fill(~tokens.mask[:, None], 0)
            balanced = self.balance(scores)
        return Route(indices, weights, balanced, logits)

    def decide(self, name: str, choose: Callable[[], Tensor]) -> Tensor:
        """``choose()``, once: in a recomputation what it gave before, or what a :class:`RouterReplay` says.

        Args:
            name: of the decision.
            choose: gives whole numbers or booleans of each token. [T, ..]
        """
        source = self.source
        return decided(name, choose if source is None else lambda: source(name, choose))

    def chose(self, counts: Tensor) -> None:
        """See what a training forward has chosen, once: not in recomputations, nor in evaluation.

        Args:
            counts: choices of this rank's tokens that fell on each expert. [E]
        """

    def logits(self, x: Tensor, tokens: Tokens) -> Tensor:  # [T, D] -> [T, E]
        """What scores are made of, in fp32, or fp64 of fp64."""
        logits = full_precision_linear(x, self.weight)
        return logits if self.bias is None else logits + self.bias

    def prefer(self, scores: Tensor, tokens: Tokens) -> Tensor:  # [T, E] -> [T, E]
        """What experts are chosen by: the scores, unless a subclass says otherwise. No gradient."""
        return scores

    def choose(self, scores: Tensor, tokens: Tokens) -> Tensor:  # [T, E] -> [T, k]
        """Indices of the experts that are chosen, best first; alike on ranks that hold the same tokens."""
        preferences = self.prefer(scores, tokens)
        if self.groups is not None:
            preferences = self.groups.limit(preferences)
        return self.activation_layout.agree(largest(preferences, self.top_k))

    def weigh(self, logits: Tensor, scores: Tensor, indices: Tensor) -> Tensor:  # [T, E] twice, [T, k] -> [T, k]
        """What the chosen experts' outputs are multiplied with."""
        weights = scores.gather(-1, indices)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + _LEAST)
        return weights if self.routed_scaling_factor == 1 else weights * self.routed_scaling_factor

    def balance(self, scores: Tensor) -> Tensor:  # [T, E] -> [T, E]
        """The scores that the load-balance loss is of, whose rows are to sum to 1."""
        return scores

    def places(self, count: int, tokens: Tokens, device: torch.device) -> Tensor:
        """The number of each of ``count`` tokens in the micro-step, alike on every layout. [T]"""
        return tokens.places(count, self.activation_layout.shard_axis, self.data, device)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_experts={self.num_experts}, top_k={self.top_k}"
