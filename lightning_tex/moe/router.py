"""Which experts each token goes to, and with what weight."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_tex.parallel.autocast import autocast_off
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.initialization import by_index, init_uniform_
from lightning_tex.parallel.replay import decided
from lightning_tex.parallel.sharding import TexModule

# T tokens, D model width, E experts, k choices per token


class Route(NamedTuple):
    """A router's decision.

    indices: [T, k] int64, the chosen experts, best first; E where the token is masked out.
    weights: [T, k], what the chosen experts' outputs are multiplied with; 0 where masked.
    scores:  [T, E], non-negative, rows sum to 1 for a softmax: what the load-balance loss pushes on.
    logits:  [T, E], what the z-loss pushes on.
    """

    indices: Tensor
    weights: Tensor
    scores: Tensor
    logits: Tensor


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


class Router(TexModule):
    """Base of all routers: linear logits in fp32, scores, top-k. A subclass defines :meth:`score`, or all of forward.

    Ranks of one tensor group hold the same tokens and must decide alike: the decision of tensor rank 0 is theirs.
    Indices come from detached scores, and in a recomputation from its tape: what is chosen is chosen once.

    Args:
        dim: model width D.
        num_experts: E.
        top_k: choices per token, k.
        norm_topk_prob: rescale a token's k weights to sum to 1.

    Raises:
        ValueError: ``top_k`` outside 1..num_experts.
    """

    full_precision = True

    def __init__(self, dim: int, num_experts: int, top_k: int = 1, norm_topk_prob: bool = False) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise UserValueError(f"top_k={top_k} must be between 1 and num_experts={num_experts}")
        self.dim, self.num_experts, self.top_k, self.norm_topk_prob = dim, num_experts, top_k, norm_topk_prob
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    @by_index
    def reset_parameters(self) -> None:
        """Draw as ``torch.nn.Linear`` does: uniform within 1/sqrt(dim)."""
        init_uniform_(self.weight, 1 / math.sqrt(self.dim), self.boxes()["weight"])

    @abstractmethod
    def score(self, logits: Tensor) -> Tensor:  # [T, E] -> [T, E]
        """Non-negative scores from logits."""
        raise NotImplementedError

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Route:
        """Route tokens.

        Args:
            x: [T, D], any floating dtype; computed in fp32, or fp64 for fp64.
            token_mask: [T] boolean, False for tokens that go to no expert (padding).
        """
        with autocast_off(x):
            logits = _FullPrecisionLinear.apply(x, self.weight)
            scores = self.score(logits)
            indices = decided("the choice of experts", lambda: self.choose(scores.detach()))
            weights = scores.gather(-1, indices)
            if self.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
            if token_mask is not None:
                indices = indices.masked_fill(~token_mask[:, None], self.num_experts)
                weights = weights.masked_fill(~token_mask[:, None], 0)
        return Route(indices, weights, scores, logits)

    def choose(self, scores: Tensor) -> Tensor:  # [T, E] -> [T, k]
        """Indices of the experts that are chosen, best first; alike on ranks that hold the same tokens."""
        return self.activation_layout.agree(scores.topk(self.top_k, dim=-1).indices)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_experts={self.num_experts}, top_k={self.top_k}"


class SoftmaxRouter(Router):
    """Softmax over all experts, then the k largest (Switch, GShard, Mixtral with ``norm_topk_prob``)."""

    def score(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)


class ForcedBalanceRouter(SoftmaxRouter):
    """Chooses by the token's place, as many tokens for each expert; weights are those of the softmax, with gradients.

    Learns nothing worth having: it makes benches of one routing out of any weights and tokens.
    """

    def choose(self, scores: Tensor) -> Tensor:
        tokens, experts = scores.shape
        return torch.arange(tokens * self.top_k, device=scores.device).view(tokens, self.top_k) % experts


ROUTERS: dict[str, type[Router]] = {"softmax": SoftmaxRouter, "forced_balance": ForcedBalanceRouter}


def make_router(router: str | Router | type[Router], dim: int, num_experts: int, top_k: int, norm: bool) -> Router:
    """The router a user asked for by name, class or instance.

    Raises:
        ValueError: unknown name, or an instance made for other sizes.
    """
    if isinstance(router, Router):
        if (router.dim, router.num_experts, router.top_k) != (dim, num_experts, top_k):
            raise UserValueError(
                f"router is made for dim={router.dim}, num_experts={router.num_experts}, top_k={router.top_k}; "
                f"the MoE layer has dim={dim}, num_experts={num_experts}, top_k={top_k}"
            )
        return router
    if isinstance(router, str):
        if router not in ROUTERS:
            known = ", ".join(map(repr, ROUTERS))
            raise UserValueError(f"router={router!r}; legal: {known}, or a Router class or instance")
        router = ROUTERS[router]
    return router(dim, num_experts, top_k, norm)
