"""Rotary position embedding: tables made once for all layers of a model, and queries and keys that they turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_tex.layers.rotary_scaling import RotaryScaling
from lightning_tex.parallel.compiled import sequence_leaf
from lightning_tex.parallel.precision import product_dtype

# B sequences, S positions, h heads, d head width


@dataclass(frozen=True)
class RotaryTables:
    """Cosines and sines of the angles by which positions turn.

    Args:
        cos: [1, S, 1, d], in the dtype of queries and keys; [B, S, 1, d] where sequences have positions of their own.
        sin: [1, S, 1, d / 2] or [B, S, 1, d / 2], likewise.
        interleaved: pairs lie side by side in queries and keys, (2i, 2i + 1), and not in halves.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    def turn(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:  # [B, S, h, d or more] each, of any h
        """Queries and keys at their positions; what is wider than d keeps the rest as it is.

        Interleaved pairs come out in halves, in queries as in keys: their products are the same.
        """
        width = self.cos.shape[-1]
        rest = [x[..., width:] for x in (query, key)]
        query, key = (self._in_halves(x[..., :width]) for x in (query, key))
        turned: tuple[Tensor, Tensor] = _Turn.apply(query, key, self.cos, self.sin)
        if not rest[0].shape[-1]:
            return turned
        query, key = (torch.cat(parts, -1) for parts in zip(turned, rest, strict=True))
        return query, key

    def _in_halves(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if self.interleaved else x


@dataclass(frozen=True)
class Rotary:
    """Pairs (i, i + d/2) of a head turn by position * base^(-2i/d) (RoFormer, arXiv 2104.09864, in halves).

    Args:
        width: d, even; heads may be wider, of which the first d dims turn.
        base: of the wavelengths.
        scaling: of sequences longer than a model was trained on.
        interleaved: pairs are (2i, 2i + 1).
    """

    width: int
    base: float = 10000.0
    scaling: RotaryScaling | None = None
    interleaved: bool = False

    def rates(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Radians by which each pair turns from one position to the next, before they are scaled: [d / 2]."""
        half = self.width // 2
        return self.base ** (-torch.arange(half, device=device, dtype=dtype) / half)

    def tables(self, length: int, like: Tensor, positions: Tensor | None = None) -> RotaryTables:
        """Those of sequences of that length, where ``like`` is and in the dtype that products with it have.

        Args:
            length: of the sequences, by which a scaling may go.
            like: what is multiplied with.
            positions: [B, S] integers; ``None``: 0 to length - 1 in every sequence.
        """
        dtype = product_dtype(like)
        wide = torch.promote_types(dtype, torch.float32)
        rates, factor = self.rates(like.device, wide), 1.0
        if self.scaling is not None:
            rates, factor = self.scaling.rates(rates, self.base, length), self.scaling.table_factor(length)
        if positions is None:
            positions = torch.arange(length, device=like.device)[None]
        angle = positions.to(wide)[..., None, None] * rates  # [B, S, 1, d / 2]
        cos, sin = angle.cos(), angle.sin()
        if factor != 1:
            cos, sin = cos * factor, sin * factor
        return RotaryTables(cos.repeat(1, 1, 1, 2).to(dtype), sin.to(dtype), self.interleaved)


class _Turn(torch.autograd.Function):
    """Queries and keys turned forward, their gradients turned back: nothing but the tables is kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _turned(query, key, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return *_turned(query, key, cos, sin, True), None, None


@sequence_leaf
def _turned(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """(a, b) -> (a cos - b sin, b cos + a sin), or the transpose of it, which turns by the opposite angles."""
    half, sign = sin.shape[-1], -1 if back else 1
    results = query * cos, key * cos
    for x, result in zip((query, key), results, strict=True):
        result[..., :half].addcmul_(x[..., half:], sin, value=-sign)
        result[..., half:].addcmul_(x[..., :half], sin, value=sign)
    return results
