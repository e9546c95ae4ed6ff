"""Routers by a softmax over all experts: the k largest, Switch's, GShard's, SparseMixer's, and a forced balance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_tex.moe.noise import TokenNoise, token_uniform
from lightning_tex.moe.router import Route, Router
from lightning_tex.moe.tokens import Tokens
from lightning_tex.parallel.errors import UserValueError

# T tokens, D model width, E experts, k choices per token


class SoftmaxRouter(Router):
    """Softmax over all experts, then the k largest (Switch, GShard, DeepSeek-V2).

    With ``norm_topk_prob`` the weights are also the softmax over the k largest logits alone, the softmax after the
    choice, which is how Mixtral, gpt-oss and Granite-MoE compute them.
    """

    def score(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)


class SwitchRouter(SoftmaxRouter):
    """One expert for each token, of inputs that training multiplies with numbers near 1.

    (Switch, arXiv 2101.03961, section 2.4.) A token's numbers are the same on every layout and in a recomputation.

    Args:
        args, kwargs: as of :class:`Router`.
        jitter_eps: the numbers are uniform within 1 - eps and 1 + eps; 0: none.

    Raises:
        ValueError: ``top_k`` other than 1, or ``jitter_eps`` outside 0..1.
    """

    def __init__(
        self, dim: int, num_experts: int, top_k: int = 1, *args: Any, jitter_eps: float = 0.01, **kwargs: Any
    ) -> None:
        super().__init__(dim, num_experts, top_k, *args, **kwargs)
        if top_k != 1:
            raise UserValueError(f"router 'switch' with top_k={top_k}; legal: 1, or the router 'softmax'")
        if not 0 <= jitter_eps < 1:
            raise UserValueError(f"jitter_eps={jitter_eps}; legal: 0, or above and below 1")
        self.jitter_eps = jitter_eps
        self.noise = TokenNoise() if jitter_eps else None

    def logits(self, x: Tensor, tokens: Tokens) -> Tensor:
        if self.training and self.noise is not None:
            numbers = token_uniform(self.noise.of_forward(), self.places(len(x), tokens, x.device), x.shape[-1])
            wide = numbers.to(torch.promote_types(x.dtype, numbers.dtype))
            x = x * wide.mul_(2 * self.jitter_eps).add_(1 - self.jitter_eps)
        return super().logits(x, tokens)


class GShardRouter(SoftmaxRouter):
    """The two largest, of which training leaves the second out at random (GShard, arXiv 2006.16668, Algorithm 1).

    A token's two weights sum to 1. The second choice is kept with a probability of twice its weight, which is alike on
    every layout and in a recomputation; the first one's weight does not depend on it. In evaluation it is always kept.

    Raises:
        ValueError: ``top_k`` other than 2.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int = 2, norm_topk_prob: bool = True, **kwargs: Any) -> None:
        super().__init__(dim, num_experts, top_k, True, **kwargs)
        if top_k != 2:
            raise UserValueError(f"router 'gshard' with top_k={top_k}; legal: 2, or the router 'softmax'")
        self.noise = TokenNoise()

    def forward(self, x: Tensor, tokens: Tokens | None = None) -> Route:
        route = super().forward(x, tokens)
        if not self.training:
            return route
        out = self.decide("second choices left out", lambda: self._left_out(route.weights.detach(), tokens or Tokens()))
        return route._replace(
            indices=route.indices.masked_fill(out, self.num_experts), weights=route.weights.masked_fill(out, 0)
        )

    def _left_out(self, weights: Tensor, tokens: Tokens) -> Tensor:  # [T, 2] -> [T, 2] boolean
        places = self.places(len(weights), tokens, weights.device)
        # Numbers up to 1/2, for the second alone: of the first nothing is left out.
        numbers = token_uniform(self.noise.of_forward(), places, 1) / 2
        second = self.activation_layout.agree(numbers >= weights[:, 1:] / self.routed_scaling_factor)
        return torch.cat([torch.zeros_like(second), second], 1)


class SparseMixerRouter(SoftmaxRouter):
    """The k largest logits; a choice's weight is its softmax among those that are left and not far below (Phi-MoE).

    Left are experts that are no earlier choice of the token; far below are logits l with (top - l) / max(|l|, top) of
    more than twice ``jitter_eps``, the top one being the choice (SparseMixer-v2, arXiv 2409.12136, without its sampling
    and its estimate of gradients: choices are the largest, and gradients those of the weights).

    Args:
        args, kwargs: as of :class:`Router`.
        jitter_eps: half of how far below.
    """

    def __init__(self, dim: int, num_experts: int, *args: Any, jitter_eps: float = 0.01, **kwargs: Any) -> None:
        super().__init__(dim, num_experts, *args, **kwargs)
        self.jitter_eps = jitter_eps

    def weigh(self, logits: Tensor, scores: Tensor, indices: Tensor) -> Tensor:
        weights, left = [], logits
        for chosen in indices.split(1, dim=-1):  # [T, 1]
            top = left.detach().gather(-1, chosen)
            far = (top - logits.detach()) / logits.detach().abs().maximum(top) > 2 * self.jitter_eps
            weights.append(left.masked_fill(far, float("-inf")).softmax(-1).gather(-1, chosen))
            left = left.scatter(-1, chosen, float("-inf"))
        return torch.cat(weights, -1)


class ForcedBalanceRouter(SoftmaxRouter):
    """Chooses by the token's place, as many tokens for each expert; weights are those of the softmax, with gradients.

    Learns nothing worth having: it makes benches of one routing out of any weights and tokens.
    """

    tokenwise = False

    def choose(self, scores: Tensor, tokens: Tokens) -> Tensor:
        count, experts = scores.shape
        return torch.arange(count * self.top_k, device=scores.device).view(count, self.top_k) % experts
