"""What a batch says of its tokens, made once for all layers of a model: what a token sees, and where it stands."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_tex.layers.attention_scores import AttentionScores
from lightning_tex.layers.rotary import Rotary, RotaryTables

# B sequences, S positions, h query heads and g key/value heads, d and c their widths


class Context(ABC):
    """Which tokens are real, where they stand, and what each of them sees; over whole sequences on every rank.

    Attributes:
        token_mask: [B, S] boolean, False for padding; ``None``: there is none.
    """

    token_mask: Tensor | None

    @abstractmethod
    def pack(self, x: Tensor) -> Tensor:  # [B, S, D] -> [B, S, D]
        """Each sequence's tokens in their order, then its padding: as attention has them."""

    @abstractmethod
    def unpack(self, x: Tensor) -> Tensor:  # [B, S, D] -> [B, S, D]
        """What :meth:`pack` has put together, back where it stood."""

    @abstractmethod
    def tables(self, rotary: Rotary, length: int, like: Tensor) -> RotaryTables:
        """Those by which packed tokens turn; ``length`` is S, ``like`` as of :meth:`Rotary.tables`."""

    def of_layer(self, layer: int) -> Context:
        """What the layer of that number is given, where layers differ in what they remember."""
        return self

    @abstractmethod
    def attend(
        self,
        scores: AttentionScores,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Mix values of packed tokens that are seen; arguments as of :meth:`AttentionScores.attend`.

        Args:
            scores: what becomes of the products.
            query, key, value: [B, h, S, d], [B, g, S, d], [B, g, S, c].
            dropout: of the weights.
            sinks: [h].

        Returns:
            [B, h, S, c]
        """


@dataclass(frozen=True)
class TokenContext(Context):
    """Every token sees the real ones of its sequence up to itself.

    Where tokens come first and padding last (:meth:`pack`), a token's place is its position, and causal attention needs
    no mask: no token sees what comes later. What attention gives at padding is nobody's.

    Args:
        token_mask: [B, S] boolean, False for padding.
        order: [B, S] int64, the position of what comes first, second, .. in a packed sequence.
        places: [B, S] int64, the place of each position in it: the inverse.
    """

    token_mask: Tensor
    order: Tensor
    places: Tensor

    @classmethod
    def causal(cls, token_mask: Tensor) -> TokenContext:
        """Every token sees the real ones up to itself; padding, on either side or between, is as if it were not there.

        Args:
            token_mask: [B, S], True or 1 for a token, False or 0 for padding.
        """
        token_mask = token_mask.bool()
        order = (~token_mask).to(torch.uint8).argsort(dim=-1, stable=True)
        return cls(token_mask, order, order.argsort(-1))

    @property
    def position_ids(self) -> Tensor:
        """[B, S] int64, of a token among the real ones of its sequence, from 0."""
        return (self.token_mask.cumsum(-1) - 1).clamp(min=0)

    @property
    def visible(self) -> Tensor:
        """[B, 1, S, S] boolean, True where a position (dim -2) sees another one (dim -1): for attention of your own."""
        return visible_keys(self.token_mask[:, None, None, :], causal=True)

    def pack(self, x: Tensor) -> Tensor:  # [B, S, D] -> [B, S, D]
        """Each sequence's tokens in their order, then its padding."""
        packed: Tensor = _Reordered.apply(x, self.order, self.places)
        return packed

    def unpack(self, x: Tensor) -> Tensor:  # [B, S, D] -> [B, S, D]
        """What :meth:`pack` has put together, back where it stood."""
        unpacked: Tensor = _Reordered.apply(x, self.places, self.order)
        return unpacked

    def tables(self, rotary: Rotary, length: int, like: Tensor) -> RotaryTables:
        return rotary.tables(length, like)

    def attend(
        self,
        scores: AttentionScores,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        return scores.attend(query, key, value, None, True, dropout, sinks)


class _Reordered(torch.autograd.Function):
    """Rows of each sequence by index; their gradients by the inverse, where torch's own backward would add them up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _rows(x, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _rows(grad, *ctx.saved_tensors), None, None


def _rows(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order[..., None].expand_as(x))


def visible_keys(mask: Tensor, causal: bool) -> Tensor:
    """A boolean mask that broadcasts to [B, H, S, S], without what comes later if ``causal``, and never without a key.

    A position that may see nothing, as one of padding, sees itself, or its softmax would be 0/0.
    """
    length = mask.shape[-1]
    if causal:
        mask = mask & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    blind = ~mask.any(-1, keepdim=True)
    return mask | blind & torch.eye(length, dtype=torch.bool, device=mask.device)
