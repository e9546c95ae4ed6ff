"""Experts by the token itself: a fixed hash of its id."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_tex.moe.choice import largest
from lightning_tex.moe.router import Route, Router
from lightning_tex.moe.tokens import Tokens
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.hashing import stable_hash, uniform

# T tokens, D model width, E experts, k choices per token


class HashRouter(Router):
    """A token of the vocabulary always uses the same k experts, each with weight 1/k (Hash Layers, arXiv 2106.04426).

    Nothing is learned: experts are a random hash of the token's id (section 3.1), of which the layer must be told
    (``MoE(..)(x, token_ids=ids)``; a :class:`~lightning_tex.models.Decoder` does). Scores are even, logits 0: losses of
    the routing push on nothing.

    Args:
        dim, num_experts, top_k, norm_topk_prob: as of :class:`Router`; weights sum to 1.
        routed_scaling_factor: as of :class:`Router`.
        seed: another one is another hash. Layers of one seed have the same.
    """

    needs_ids = True
    learned = False

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 1,
        norm_topk_prob: bool = True,
        *,
        routed_scaling_factor: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(dim, num_experts, top_k, norm_topk_prob, routed_scaling_factor=routed_scaling_factor)
        self.seed = seed

    def forward(self, x: Tensor, tokens: Tokens | None = None) -> Route:
        """See the base class.

        Raises:
            ValueError: tokens without ids.
        """
        tokens = tokens or Tokens()
        if tokens.ids is None:
            raise UserValueError(
                "router 'hash' without token ids; legal: MoE(..)(x, token_ids=ids), ids of x's shape without its last "
                "dim, or another router"
            )
        ids, dtype = tokens.ids, torch.promote_types(x.dtype, torch.float32)
        indices = self.decide("the choice of experts", lambda: self._hashed(ids))
        weights = torch.full(indices.shape, self.routed_scaling_factor / self.top_k, dtype=dtype, device=x.device)
        if tokens.mask is not None:
            indices = indices.masked_fill(~tokens.mask[:, None], self.num_experts)
            weights = weights.masked_fill(~tokens.mask[:, None], 0)
        scores = torch.full((len(x), self.num_experts), 1 / self.num_experts, dtype=dtype, device=x.device)
        return Route(indices, weights, scores, torch.zeros_like(scores))

    def score(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def _hashed(self, ids: Tensor) -> Tensor:  # [T] -> [T, k]
        pairs = ids[:, None] * self.num_experts + torch.arange(self.num_experts, device=ids.device)
        return largest(uniform(pairs, stable_hash("experts of a token", self.seed)), self.top_k)
