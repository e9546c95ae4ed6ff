"""Experts that choose their tokens, as many each."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_tex.moe.softmax_routers import SoftmaxRouter
from lightning_tex.moe.tokens import Tokens
from lightning_tex.parallel.collectives import all_gather
from lightning_tex.parallel.errors import UserValueError

# T tokens held here, B sequences, S positions of each, G groups of n tokens, E experts, k choices per token

Within = Literal["sequence", "batch"]


class ExpertChoiceRouter(SoftmaxRouter):
    """Each expert chooses the tokens with its largest scores, as many as every other (arXiv 2202.09368, section 3.2).

    Of n tokens it takes ceil(k n / E): a token has k experts on average, and from none to all of them. Nothing
    overflows, and every expert is used alike without any loss. It is **not causal**: whether a token is chosen depends
    on those that follow it. Losses of a language model look better than it is, and nothing can be generated.

    Scores are a softmax over experts for each token, its chosen ones are the weights. Padding is no token. Of equal
    scores that of the earlier token is taken.

    Args:
        dim, num_experts, top_k, norm_topk_prob: as of :class:`Router`; k is the mean over tokens.
        within: what an expert chooses from: ``"sequence"``: each sequence by itself, which no layout, micro-batch or
            accumulation changes, and which sends scores over tensor at most; ``"batch"``: all tokens of the micro-step
            on all data ranks, as in the paper, for which scores of all tokens go to every rank.
        kwargs: as of :class:`Router`, but for groups of experts.

    Raises:
        ValueError: another word, or groups of experts.
    """

    tokenwise = False
    experts_choose = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 1,
        norm_topk_prob: bool = False,
        *,
        within: Within = "sequence",
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_experts, top_k, norm_topk_prob, **kwargs)
        if within not in get_args(Within):
            raise UserValueError(f"within={within!r}; legal: {', '.join(map(repr, get_args(Within)))}")
        if self.groups is not None:
            raise UserValueError(
                f"n_group={self.groups.n_group} of the router 'expert_choice', where tokens choose nothing; legal: None"
            )
        self.within = within

    def choose(self, scores: Tensor, tokens: Tokens) -> Tensor:  # [T, E] -> [T, E]
        """Of each token and expert e: e where e has chosen it, E where not."""
        scores = self.activation_layout.agree(scores)
        real = scores.new_ones(len(scores), dtype=torch.bool) if tokens.mask is None else tokens.mask
        # A column more says which tokens are real.
        known = torch.cat([scores, real[:, None].to(scores.dtype)], 1)
        shard, length = self.activation_layout.shard_axis, len(scores) // max(tokens.sequences, 1)
        sequences = all_gather(known.view(tokens.sequences, length, self.num_experts + 1), 1, shard)  # [B, S, E + 1]
        if self.within == "batch":
            taken = self._taken_of_batch(sequences.flatten(0, 1)).view(*sequences.shape[:2], self.num_experts)
        else:
            taken = _taken(sequences, self.top_k)
        own = taken[:, shard.rank * length : (shard.rank + 1) * length].flatten(0, 1)
        experts = torch.arange(self.num_experts, device=scores.device)
        return torch.where(own, experts, self.num_experts)

    def weigh(self, logits: Tensor, scores: Tensor, indices: Tensor) -> Tensor:
        weights = scores * (indices < self.num_experts)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        return weights if self.routed_scaling_factor == 1 else weights * self.routed_scaling_factor

    def _taken_of_batch(self, known: Tensor) -> Tensor:  # [T, E + 1] -> [T, E] boolean
        sizes = self._sizes(len(known), known.device)
        taken = _taken(all_gather(known, 0, self.data, sizes)[None], self.top_k)[0]
        return taken.split(sizes)[self.data.rank]

    def _sizes(self, tokens: int, device: torch.device) -> list[int]:
        """Tokens of each data rank, which the host has to know."""
        if self.data.size == 1:
            return [tokens]
        return all_gather(torch.tensor([tokens], device=device), 0, self.data, operation="exchange_counts").tolist()


def _taken(known: Tensor, top_k: int) -> Tensor:  # [G, n, E + 1] -> [G, n, E] boolean
    """Which tokens of its group each expert takes."""
    scores, real = known[..., :-1], known[..., -1:] > 0
    experts = scores.shape[-1]
    each = (top_k * real.sum(1, keepdim=True) + experts - 1) // experts  # [G, 1, 1]
    wanted = scores.masked_fill(~real, -1.0).sort(dim=1, descending=True, stable=True).indices  # [G, n, E]
    place = torch.empty_like(wanted)
    places = torch.arange(known.shape[1], device=known.device)[None, :, None].expand_as(wanted)
    place.scatter_(1, wanted, places)
    return (place < each) & real
