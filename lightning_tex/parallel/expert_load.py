"""How many choices fell on each expert, counted where it happens."""

from __future__ import annotations

import torch
from torch import Tensor

# E experts


class ExpertLoad:
    """Where one MoE layer's choices fell since somebody last looked: this rank's tokens, training forwards only."""

    def __init__(self) -> None:
        self.counts: Tensor | None = None
        self.overflowed: Tensor | None = None

    def add(self, counts: Tensor, overflowed: Tensor) -> None:
        """Add one forward's [E] choices and its number of overflowed ones."""
        self.counts = counts if self.counts is None else self.counts + counts
        self.overflowed = overflowed if self.overflowed is None else self.overflowed + overflowed

    def take(self) -> Tensor | None:
        """[E + 1]: the choices of each expert, then the overflowed ones; then forgotten. None if there were none."""
        if self.counts is None or self.overflowed is None:
            return None
        taken = torch.cat([self.counts, self.overflowed[None]])
        self.counts = self.overflowed = None
        return taken
