"""How many choices fell on each expert and how sure the router was, counted where it happens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# T tokens, E experts


class LoadTotals(NamedTuple):
    """What a layer counted, on this rank or summed over ranks; of the last three 0 where nobody asked for them.

    counts:     [E] choices of each expert.
    overflowed: choices that their experts did not serve.
    tokens:     whose scores were looked at.
    entropy:    of these tokens' scores, summed, in nats.
    confidence: the first choice's share of these tokens' scores, summed.
    """

    counts: Tensor
    overflowed: Tensor
    tokens: Tensor
    entropy: Tensor
    confidence: Tensor

    @classmethod
    def of(cls, numbers: Tensor) -> LoadTotals:
        """From one tensor, as :meth:`ExpertLoad.take_totals` gives it. [E + 4]"""
        return cls(numbers[:-4], *numbers[-4:].unbind())


class ExpertLoad:
    """Where one MoE layer's choices fell since somebody last looked: this rank's tokens, training forwards only.

    Attributes:
        looks_at_scores: whether the next forwards look at the router's scores as well, which costs a pass over them.
    """

    def __init__(self) -> None:
        self.looks_at_scores = False
        self.counts: Tensor | None = None
        self.overflowed: Tensor | None = None
        self._seen: Tensor | None = None

    def add(self, counts: Tensor, overflowed: Tensor) -> None:
        """Add one forward's [E] choices and its number of overflowed ones."""
        self.counts = counts if self.counts is None else self.counts + counts
        self.overflowed = overflowed if self.overflowed is None else self.overflowed + overflowed

    def look(self, scores: Tensor, token_mask: Tensor | None) -> None:
        """Add how sure the router was in one forward, if that is asked for.

        Args:
            scores: of the router, non-negative. [T, E]
            token_mask: [T] boolean; ``None``: every token counts.
        """
        if self.looks_at_scores:
            seen = _sureness(scores.detach().double(), token_mask)
            self._seen = seen if self._seen is None else self._seen + seen

    def take(self) -> Tensor | None:
        """[E + 1]: the choices of each expert, then the overflowed ones; then forgotten. None if there were none."""
        if self.counts is None or self.overflowed is None:
            return None
        taken = torch.cat([self.counts, self.overflowed[None]])
        self.counts = self.overflowed = None
        return taken

    def take_seen(self) -> Tensor | None:
        """[3] fp64: tokens that were looked at, entropies and first shares of their scores, summed; then forgotten.

        None if nobody looked.
        """
        seen, self._seen = self._seen, None
        return seen

    def take_totals(self) -> Tensor | None:
        """All of :class:`LoadTotals` in one tensor, fp64, then forgotten; ``None`` if there were no choices. [E + 4]"""
        taken, seen = self.take(), self.take_seen()
        if taken is None:
            return None
        return torch.cat([taken.double(), taken.new_zeros(3, dtype=torch.float64) if seen is None else seen])


def _sureness(scores: Tensor, token_mask: Tensor | None) -> Tensor:
    """Tokens, their entropies and their first choices' shares, summed. [3]"""
    shares = scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    of_token = torch.stack([torch.ones_like(shares[:, 0]), torch.special.entr(shares).sum(-1), shares.amax(-1)])
    return (of_token if token_mask is None else of_token * token_mask).sum(-1)
