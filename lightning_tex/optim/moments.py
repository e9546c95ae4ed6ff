"""How the optimizer's states with one value per element are kept between steps."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_tex.optim.rounding import Rounding, round_stochastically
from lightning_tex.parallel.compiled import leaf

# n elements of a window

BLOCK = 64  # elements that share a scale; windows, shards and parameters begin at multiples of it
_CODES = {torch.int8: 127, torch.uint8: 255}
_SMALLEST_ROOT = 1e-12  # below the fourth root of every fp32 number but 0


class Moments(ABC):
    """How the optimizer's states with one value per element are kept.

    Args:
        own: the parameters of the shard. [shard]
    """

    def __init__(self, own: Tensor) -> None:
        self.own = own
        self.keys: list[str] = []

    @abstractmethod
    def make(self, key: str) -> None:
        """Memory for one more state, all zero."""

    @abstractmethod
    def read(self, key: str, span: slice) -> Tensor:
        """A state's values, to be changed in place. [n] fp32"""

    @abstractmethod
    def write(self, key: str, span: slice, values: Tensor, exact: bool = False, skip: Tensor | None = None) -> None:
        """Keep a state's values, which are used up. [n] fp32

        Args:
            key, span, values: which.
            exact: they were kept in this form before: round to nearest, which changes nothing.
            skip: 1 where that is so, which only the device knows.
        """

    @abstractmethod
    def memory(self) -> list[Tensor]:
        """What is kept."""

    def clear(self) -> None:
        """Drop everything."""
        self.keys = []


class Fp32Moments(Moments):
    """As they are."""

    def __init__(self, own: Tensor) -> None:
        super().__init__(own)
        self.values: dict[str, Tensor] = {}

    def make(self, key: str) -> None:
        self.keys.append(key)
        self.values[key] = torch.zeros_like(self.own, dtype=torch.float32)

    def read(self, key: str, span: slice) -> Tensor:
        return self.values[key][span]

    def write(self, key: str, span: slice, values: Tensor, exact: bool = False, skip: Tensor | None = None) -> None:
        kept = self.values[key][span]
        if not values.is_set_to(kept):
            kept.copy_(values)

    def memory(self) -> list[Tensor]:
        return list(self.values.values())

    def clear(self) -> None:
        super().clear()
        self.values.clear()


class RoundedMoments(Moments):
    """In bf16, rounded up or down at random: small increments, which rounding to nearest would lose, add up."""

    def __init__(self, own: Tensor, rounding: Rounding) -> None:
        super().__init__(own)
        self.rounding = rounding
        self.values: dict[str, Tensor] = {}

    def make(self, key: str) -> None:
        self.keys.append(key)
        self.values[key] = torch.zeros_like(self.own, dtype=torch.bfloat16)

    def read(self, key: str, span: slice) -> Tensor:
        return self.values[key][span].float()

    def write(self, key: str, span: slice, values: Tensor, exact: bool = False, skip: Tensor | None = None) -> None:
        kept = self.values[key][span]
        if exact:
            kept.copy_(values)
        else:
            round_stochastically(values, self.rounding.bits(span, key), kept)

    def memory(self) -> list[Tensor]:
        return list(self.values.values())

    def clear(self) -> None:
        super().clear()
        self.values.clear()


class Int8Moments(Moments):
    """8 bits per value and an fp32 scale per block of 64: value = scale * (code / largest code)^4.

    The fourth power spreads the codes over nine decades below a block's largest value, which squares of gradients
    need; a value above 0 never becomes 0, or the step, which divides by it, would be unbounded. Values that are never
    negative have no sign bit, and are rounded at random: an average over a thousand steps moves by less than a code.

    Args:
        own: the parameters of the shard. [shard]
        nonnegative: states that are never negative.
        rounding: random bits.
    """

    def __init__(self, own: Tensor, nonnegative: frozenset[str], rounding: Rounding) -> None:
        super().__init__(own)
        self.nonnegative, self.rounding = nonnegative, rounding
        self.codes: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}

    def make(self, key: str) -> None:
        self.keys.append(key)
        dtype = torch.uint8 if key in self.nonnegative else torch.int8
        self.codes[key] = torch.zeros_like(self.own, dtype=dtype)
        self.scales[key] = torch.zeros(len(self.own) // BLOCK, dtype=torch.float32, device=self.own.device)

    def read(self, key: str, span: slice) -> Tensor:
        return decoded(self.codes[key][span], self._scales(key, span))

    def write(self, key: str, span: slice, values: Tensor, exact: bool = False, skip: Tensor | None = None) -> None:
        codes = self.codes[key][span]
        at_random = codes.dtype == torch.uint8 and not exact
        encode(values, codes, self._scales(key, span), self.rounding.bits(span, key) if at_random else None, skip)

    def _scales(self, key: str, span: slice) -> Tensor:
        return self.scales[key][span.start // BLOCK : span.stop // BLOCK]

    def memory(self) -> list[Tensor]:
        return [*self.codes.values(), *self.scales.values()]

    def clear(self) -> None:
        super().clear()
        self.codes.clear()
        self.scales.clear()


@leaf
def decoded(codes: Tensor, scales: Tensor) -> Tensor:
    """Values of eight-bit codes. [n] int8 or uint8, [n / 64] fp32 -> [n] fp32"""
    values = codes.float().div_(_CODES[codes.dtype])
    if codes.dtype == torch.int8:
        values = values.square().square_().copysign_(values)
    else:
        values.square_().square_()
    values.view(-1, BLOCK).mul_(scales[:, None])
    return values


@leaf
def encode(values: Tensor, codes: Tensor, scales: Tensor, bits: Tensor | None, skip: Tensor | None) -> None:
    """Keep values as eight-bit codes.

    Args:
        values: used up. [n] fp32
        codes: for them. [n] int8 or uint8
        scales: for those of their blocks. [n / 64] fp32
        bits: 16 random ones each, by which values that are never negative are rounded; ``None``: to the nearest. [n]
        skip: 1 where they are rounded to the nearest nevertheless.
    """
    size = values.abs()
    blocks = size.view(-1, BLOCK)
    largest = blocks.amax(1, keepdim=True)
    scales.copy_(largest[:, 0])
    # The fourth root of a quotient, as a quotient of roots. However these are rounded, the largest value gets the
    # largest code: it comes out a little above that, and what is added at random stays as much below 1.
    roots = largest.sqrt_().sqrt_().clamp_(min=_SMALLEST_ROOT)
    size.sqrt_().sqrt_()
    blocks.mul_(roots.reciprocal_().mul_(_CODES[codes.dtype] * (1 + 2**-21)))
    if codes.dtype == torch.int8:
        codes.copy_(size.round_().copysign_(values))
    elif bits is None:
        codes.copy_(size.round_())
    elif skip is None:
        size.add_(bits, alpha=2**-16 * (1 - 2**-11))
        codes.copy_(size.maximum(values.sign_()))  # cuts off, downwards
    else:
        size.add_(torch.where(skip > 0, 0.5, bits * (2**-16 * (1 - 2**-11))))
        codes.copy_(size.maximum(values.sign_()))
