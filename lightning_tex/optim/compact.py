"""Formats that keep less than they update: a window is put together for its step and taken apart after it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tex.optim.formats import MASTER, Kept, StateFormat, Window, per_element
from lightning_tex.optim.rounding import Rounding

# n elements of a window; those of 16-bit storage are seen as int16, those of fp32 as int32

BLOCK = 64  # elements that share a scale; windows, shards and parameters begin at multiples of it
_CODES = {torch.int8: 127, torch.uint8: 255}


class Master(ABC):
    """How the fp32 values behind bf16 parameters are kept.

    Args:
        own: the parameters. [shard] bf16
    """

    exact: bool

    def __init__(self, own: Tensor) -> None:
        self.own = own

    @abstractmethod
    def read(self, span: slice) -> Tensor:
        """The values, a copy. [n] fp32"""

    @abstractmethod
    def write(self, span: slice, values: Tensor) -> None:
        """Keep values, and set the parameters to them, rounded. ``values``, [n] fp32, are used up."""

    def take_up(self) -> None:  # noqa: B027
        """The parameters are the values now."""


class SplitMaster(Master):
    """The parameter is the master's upper half, rounded to nearest (ties up in magnitude); the rest is kept beside.

    As integers, master = parameter * 2^16 + remainder with -2^15 <= remainder < 2^15: exact to the bit, in 2 bytes.
    """

    exact = True

    def __init__(self, own: Tensor) -> None:
        super().__init__(own)
        self.remainder = torch.zeros_like(own, dtype=torch.int16)

    def read(self, span: slice) -> Tensor:
        bits = self.own[span].view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
        return bits.add_(self.remainder[span]).view(torch.float32)

    def write(self, span: slice, values: Tensor) -> None:
        bits = values.view(torch.int32)
        self.remainder[span] = bits.to(torch.int16)  # the lower half, as a signed number
        self.own[span].view(torch.int16).copy_(bits.add_(0x8000).bitwise_right_shift_(16))

    def take_up(self) -> None:
        self.remainder.zero_()


class RoundedMaster(Master):
    """Nothing beside the parameter, which is rounded up or down at random, so that it is right on average."""

    exact = False

    def __init__(self, own: Tensor, rounding: Rounding) -> None:
        super().__init__(own)
        self.rounding = rounding

    def read(self, span: slice) -> Tensor:
        return self.own[span].float()

    def write(self, span: slice, values: Tensor) -> None:
        round_stochastically(values, self.rounding.bits(span, MASTER), self.own[span])


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
    def write(self, key: str, span: slice, values: Tensor, exact: bool = False) -> None:
        """Keep a state's values, which are used up. [n] fp32

        Args:
            exact: they were kept in this form before: round to nearest, which changes nothing.
        """

    def forget(self) -> None:
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

    def write(self, key: str, span: slice, values: Tensor, exact: bool = False) -> None:
        if values.data_ptr() != self.values[key][span].data_ptr():
            self.values[key][span].copy_(values)

    def forget(self) -> None:
        super().forget()
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

    def write(self, key: str, span: slice, values: Tensor, exact: bool = False) -> None:
        kept = self.values[key][span]
        if exact:
            kept.copy_(values)
        else:
            round_stochastically(values, self.rounding.bits(span, key), kept)

    def forget(self) -> None:
        super().forget()
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
        codes = self.codes[key][span]
        values = codes.float().div_(_CODES[codes.dtype])
        fourth = values.abs().mul_(values)  # keeps the sign
        values.square_()
        return fourth.mul_(values).view(-1, BLOCK).mul_(self._scales(key, span)).view(-1)

    def write(self, key: str, span: slice, values: Tensor, exact: bool = False) -> None:
        codes, blocks = self.codes[key][span], values.view(-1, BLOCK)
        scales = blocks.abs().amax(1, keepdim=True)
        self._scales(key, span).copy_(scales)
        size = blocks.abs().div_(scales.clamp_(min=torch.finfo(torch.float32).tiny)).sqrt_().sqrt_().view(-1)
        size.mul_(_CODES[codes.dtype])
        if codes.dtype == torch.int8:
            codes.copy_(size.round_().copysign_(values))
        elif exact:
            codes.copy_(size.round_())
        else:
            size.add_(self.rounding.bits(span, key), alpha=2**-16).floor_()
            codes.copy_(size.maximum(values.sign_()))

    def _scales(self, key: str, span: slice) -> Tensor:
        return self.scales[key][span.start // BLOCK : span.stop // BLOCK, None]

    def forget(self) -> None:
        super().forget()
        self.codes.clear()
        self.scales.clear()


class CompactStates(StateFormat):
    """Masters and moments, each kept in its own form.

    Args:
        own, tile_size: see :class:`StateFormat`.
        master: keeps the values.
        moments: keeps the states.
    """

    def __init__(self, own: Tensor, tile_size: int, master: Master, moments: Moments) -> None:
        super().__init__(own, tile_size)
        self.has_master = master.exact
        self.master, self.moments = master, moments
        self.forget()

    def forget(self) -> None:
        self.moments.forget()
        # By window: its numbers, and which states it has; those of the others are zero and not begun.
        self.numbers: list[dict[str, Any]] = [{} for _ in self.spans]
        self.begun: list[set[str]] = [set() for _ in self.spans]

    @contextmanager
    def window(self, i: int) -> Iterator[Window]:
        span = self.spans[i]
        tile = nn.Parameter(self.master.read(span), requires_grad=False)
        state = {**self.numbers[i], **{key: self.moments.read(key, span) for key in sorted(self.begun[i])}}
        yield Window(tile, state)
        for key, value in state.items():
            if per_element(value, tile):
                self._begin(i, key)
                self.moments.write(key, span, value)
            else:
                self.numbers[i][key] = value
        self.master.write(span, tile.detach())

    def _begin(self, i: int, key: str) -> None:
        if key not in self.moments.keys:
            self.moments.make(key)
        self.begun[i].add(key)

    def take_up(self) -> None:
        self.master.take_up()

    def kept(self, i: int) -> dict[str, Any]:
        span = self.spans[i]
        states: dict[str, Any] = {key: value for key, value in self.numbers[i].items() if value is not None}
        for key in sorted(self.begun[i]):
            states[key] = Kept(torch.float32, partial(self.moments.read, key, span))
        if self.has_master:
            states[MASTER] = Kept(torch.float32, partial(self.master.read, span))
        return states

    def place(self, i: int, key: str, dtype: torch.dtype) -> Tensor:
        span = self.spans[i]
        return torch.zeros(span.stop - span.start, dtype=torch.float32, device=self.own.device)

    def placed(self, i: int, key: str, values: Tensor) -> None:
        if key == MASTER:
            self.master.write(self.spans[i], values)
            return
        self._begin(i, key)
        self.moments.write(key, self.spans[i], values, exact=True)

    def set_number(self, i: int, key: str, value: Any) -> None:
        self.numbers[i][key] = value


def round_stochastically(values: Tensor, bits: Tensor, out: Tensor) -> None:
    """Round fp32 to bf16, up with the probability that makes it right on average.

    Args:
        values: [n] fp32, used up.
        bits: 16 random bits each. [n] int32, used up
        out: [n] bf16
    """
    rounded = bits.add_(values.view(torch.int32)).bitwise_right_shift_(16)
    out.view(torch.int16).copy_(rounded)
