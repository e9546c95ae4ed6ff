"""How many choices fell on each expert and how sure the router was, counted where it happens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# T tokens, E experts


class LoadTotals(NamedTuple):
    """What a layer counted, on this rank or summed over ranks; from ``tokens`` on 0 where nobody asked for them.

    counts:     [E] choices of each expert.
    overflowed: choices that their experts did not serve.
    tokens:     whose scores were looked at.
    entropy:    of these tokens' scores, summed, in nats.
    confidence: the first choice's share of these tokens' scores, summed.
    losses:     weighted auxiliary losses of the forwards that were looked at, summed.
    forwards:   how many.
    """

    counts: Tensor
    overflowed: Tensor
    tokens: Tensor
    entropy: Tensor
    confidence: Tensor
    losses: Tensor
    forwards: Tensor

    @classmethod
    def of(cls, numbers: Tensor) -> LoadTotals:
        """From one tensor, as :meth:`ExpertLoad.take_totals` gives it. [E + 6]"""
        further = len(cls._fields) - 1
        return cls(numbers[:-further], *numbers[-further:].unbind())


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
        self._losses: list[Tensor] = []
        self._forwards = 0

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
            self._forwards += 1

    def look_at_loss(self, loss: Tensor) -> None:
        """Add a weighted auxiliary loss of a forward, if that is asked for: a scalar."""
        if self.looks_at_scores:
            self._losses.append(loss.detach().double())

    def take(self) -> Tensor | None:
        """[E + 1]: the choices of each expert, then the overflowed ones; then forgotten. None if there were none."""
        if self.counts is None or self.overflowed is None:
            return None
        taken = torch.cat([self.counts, self.overflowed[None]])
        self.counts = self.overflowed = None
        return taken

    def take_seen(self) -> Tensor | None:
        """[5] fp64, all of :class:`LoadTotals` from ``tokens`` on; then forgotten. None if nobody looked."""
        seen, losses, forwards = self._seen, self._losses, self._forwards
        self._seen, self._losses, self._forwards = None, [], 0
        if seen is None:
            return None
        of_losses = torch.stack(losses).sum(0, keepdim=True) if losses else seen.new_zeros(1)
        return torch.cat([seen, of_losses, seen.new_full((1,), forwards)])

    def take_totals(self) -> Tensor | None:
        """All of :class:`LoadTotals` in one tensor, fp64, then forgotten; ``None`` if there were no choices. [E + 6]"""
        taken, seen = self.take(), self.take_seen()
        if taken is None:
            return None
        return torch.cat([taken.double(), taken.new_zeros(5, dtype=torch.float64) if seen is None else seen])


def _sureness(scores: Tensor, token_mask: Tensor | None) -> Tensor:
    """Tokens, their entropies and their first choices' shares, summed. [3]"""
    shares = scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    of_token = torch.stack([torch.ones_like(shares[:, 0]), torch.special.entr(shares).sum(-1), shares.amax(-1)])
    return (of_token if token_mask is None else of_token * token_mask).sum(-1)
