"""Formats that keep less than they update: a window is put together for its step and taken apart after it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_tex.optim.formats import MASTER, SavedState, StateFormat, Window, per_element
from lightning_tex.optim.moments import Moments
from lightning_tex.optim.rounding import Rounding, round_stochastically
from lightning_tex.optim.walk import Walk
from lightning_tex.parallel.compiled import leaf

# n elements of a window; those of 16-bit storage are seen as int16, those of fp32 as int32


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

    def adopt_parameters(self) -> None:  # noqa: B027
        """The parameters are the values now."""

    def memory(self) -> list[Tensor]:
        """What is kept beside the parameters."""
        return []


class SplitMaster(Master):
    """The parameter is the master's upper half, rounded to nearest (ties up in magnitude); the rest is kept beside.

    As integers, master = parameter * 2^16 + remainder with -2^15 <= remainder < 2^15: exact to the bit, in 2 bytes.
    """

    exact = True

    def __init__(self, own: Tensor) -> None:
        super().__init__(own)
        self.remainder = torch.zeros_like(own, dtype=torch.int16)

    def read(self, span: slice) -> Tensor:
        return joined(self.own[span], self.remainder[span])

    def write(self, span: slice, values: Tensor) -> None:
        split(values, self.own[span], self.remainder[span])

    def adopt_parameters(self) -> None:
        self.remainder.zero_()

    def memory(self) -> list[Tensor]:
        return [self.remainder]


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
        self.clear()

    def clear(self) -> None:
        self.moments.clear()
        # By window: its numbers, and which states it has; those of the others are zero and not begun.
        self.numbers: list[dict[str, Any]] = [{} for _ in self.spans]
        self.begun: list[set[str]] = [set() for _ in self.spans]

    @contextmanager
    def window(self, i: int, walk: Walk) -> Iterator[Window]:
        span = self.spans[i]
        tile = nn.Parameter(self.master.read(span), requires_grad=False)
        state = {**self.numbers[i], **{key: self.moments.read(key, span) for key in sorted(self.begun[i])}}
        yield Window(tile, state)
        for key, value in state.items():
            if per_element(value, tile):
                self._begin(i, key)
                self.moments.write(key, span, value, skip=walk.skip)
            else:
                self.numbers[i][key] = value
        self.master.write(span, tile.detach())

    def _begin(self, i: int, key: str) -> None:
        if key not in self.moments.keys:
            self.moments.make(key)
        self.begun[i].add(key)

    def adopt_parameters(self) -> None:
        self.master.adopt_parameters()

    def memory(self) -> Iterator[tuple[Literal["master", "moments"], Tensor]]:
        yield from (("master", tensor) for tensor in self.master.memory())
        yield from (("moments", tensor) for tensor in self.moments.memory())
        for numbers in self.numbers:
            yield from (("moments", value) for value in numbers.values() if isinstance(value, Tensor))

    def saved_states(self, i: int) -> dict[str, Any]:
        span = self.spans[i]
        states: dict[str, Any] = {key: value for key, value in self.numbers[i].items() if value is not None}
        for key in sorted(self.begun[i]):
            states[key] = SavedState(torch.float32, partial(self.moments.read, key, span))
        if self.has_master:
            states[MASTER] = SavedState(torch.float32, partial(self.master.read, span))
        return states

    def memory_for(self, i: int, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        span = self.spans[i]
        return torch.zeros(span.stop - span.start, dtype=torch.float32, device=self.own.device)

    def filled(self, i: int, key: str, values: Tensor) -> None:
        if key == MASTER:
            self.master.write(self.spans[i], values)
            return
        self._begin(i, key)
        self.moments.write(key, self.spans[i], values, exact=True)

    def set_number(self, i: int, key: str, value: Any) -> None:
        self.numbers[i][key] = value


@leaf
def joined(upper: Tensor, remainder: Tensor) -> Tensor:
    """What :func:`split` took apart. [n] bf16, [n] int16 -> [n] fp32"""
    values = upper.float()  # its bits, shifted up
    values.view(torch.int32).add_(remainder)
    return values


@leaf
def split(values: Tensor, upper: Tensor, remainder: Tensor) -> None:
    """Take values apart, to the bit: rounded, and the rest.

    Args:
        values: used up. [n] fp32
        upper: for the rounded ones. [n] bf16
        remainder: for the lower half of their bits, as a signed number. [n] int16
    """
    bits = values.view(torch.int32)
    remainder.copy_(bits)
    upper.view(torch.int16).copy_(bits.add_(0x8000).bitwise_right_shift_(16))
