"""What a batch with padding says of its tokens, made once for all layers of a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# B sequences, S positions


@dataclass(frozen=True)
class TokenContext:
    """Which tokens are real, where they stand, and what each of them sees; over whole sequences on every rank.

    Args:
        token_mask: [B, S] boolean, False for padding.
        position_ids: [B, S] int64, of a token among the real ones of its sequence, from 0.
        visible: [B, 1, S, S] boolean, True where a position (dim -2) sees another one (dim -1).
    """

    token_mask: Tensor
    position_ids: Tensor
    visible: Tensor

    @classmethod
    def causal(cls, token_mask: Tensor) -> TokenContext:
        """Every token sees the real ones up to itself; padding, on either side or between, is as if it were not there.

        Args:
            token_mask: [B, S], True or 1 for a token, False or 0 for padding.
        """
        token_mask = token_mask.bool()
        positions = (token_mask.cumsum(-1) - 1).clamp(min=0)
        return cls(token_mask, positions, visible_keys(token_mask[:, None, None, :], causal=True))


def visible_keys(mask: Tensor, causal: bool) -> Tensor:
    """A boolean mask that broadcasts to [B, H, S, S], without what comes later if ``causal``, and never without a key.

    A position that may see nothing, as one of padding, sees itself, or its softmax would be 0/0.
    """
    length = mask.shape[-1]
    if causal:
        mask = mask & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    blind = ~mask.any(-1, keepdim=True)
    return mask | blind & torch.eye(length, dtype=torch.bool, device=mask.device)
