"""How the next token is chosen by its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.hashing import stable_hash, uniform

# B sequences, V vocabulary


@dataclass(frozen=True)
class Sampling:
    """Draws tokens, the same ones wherever logits are the same: the chance is a function of (seed, step, sequence).

    Args:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: only so many of the most likely tokens; ``None``: all.
        top_p: only as many of the most likely tokens as have this probability together (nucleus sampling, arXiv
            1904.09751); ``None``: all. After ``top_k``.
        seed: of the chance.

    Raises:
        ValueError: numbers that are none of these.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserValueError(f"temperature={self.temperature}; legal: 0 (the most likely token), or above")
        if self.top_k is not None and self.top_k < 1:
            raise UserValueError(f"top_k={self.top_k}; legal: at least 1, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserValueError(f"top_p={self.top_p}; legal: above 0, at most 1, or None")

    def choose(self, logits: Tensor, step: int) -> Tensor:
        """A token for each sequence, without waiting for a GPU: [B, V] -> [B]."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.double() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        chances = logits.softmax(-1)
        if self.top_p is not None:
            chances = _nucleus(chances, self.top_p)
        # Tokens in their order, not in that of their chances, which rounding may change.
        sums = chances.cumsum(-1)
        row = torch.arange(len(logits), device=logits.device)
        drawn = uniform(row, stable_hash("sampling", self.seed, step))[:, None] * sums[:, -1:]
        chosen = torch.searchsorted(sums, drawn, right=True)[:, 0]
        return chosen.clamp(max=logits.shape[-1] - 1)


def _nucleus(chances: Tensor, top_p: float) -> Tensor:  # [B, V] -> [B, V]
    """The largest chances that sum to ``top_p`` or just above, all others 0."""
    ranked = chances.sort(-1, descending=True).values
    needed = ranked.cumsum(-1) - ranked < top_p
    least = ranked.masked_fill(~needed, 1.0).amin(-1, keepdim=True)
    return chances.masked_fill(chances < least, 0)
