"""Which documents of a stream each of its parts reads, and in which order: pure functions of the seed.

P parts, F shards, U units: shards, or where there are fewer of them than parts, every k-th document of one. The units
of all epochs, one epoch behind the other, are dealt to the parts in turn. So every epoch has each document once, parts
read about equally much whatever F is, and no two of them read the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lightning_tex.data.order import hashed, sample_order
from lightning_tex.data.streams.held_out import NOTHING, HeldOut
from lightning_tex.parallel.errors import UserValueError

_IN_ORDER = 64  # documents that are read at once where they are not shuffled


@dataclass(frozen=True)
class StreamOrder:
    """The order of a stream.

    Args:
        parts: P, which are read independently of each other.
        shards: F.
        seed: of the shuffles.
        buffer: documents of a part that are shuffled among each other; 0: nothing is shuffled, shards neither.
        held_out: rows of each shard that are left out.
    """

    parts: int
    shards: int
    seed: int = 0
    buffer: int = 0
    held_out: HeldOut = NOTHING

    @cached_property
    def divisions(self) -> int:
        """k, units of a shard."""
        return math.ceil(self.parts / self.shards)

    @property
    def units(self) -> int:
        """U."""
        return self.shards * self.divisions

    @property
    def window(self) -> int:
        """Documents of a part that are read at once, and shuffled where anything is."""
        return self.buffer or _IN_ORDER

    def unit(self, position: int) -> tuple[int, int]:
        """The unit at a position of the sequence of all epochs: its shard, and which documents of that modulo k."""
        epoch, place = divmod(position, self.units)
        return divmod(int(self._units_of(epoch)[place]), self.divisions)

    def is_in(self, remainder: int, row: int) -> bool:
        """Whether a row of a shard belongs to one of its units."""
        return not self.held_out.has(row) and (row - self.held_out.before(row)) % self.divisions == remainder

    def within(self, position: int, row: int, size: int) -> list[int]:
        """The order of the documents of a window, which begins at that row of that unit."""
        if not self.buffer:
            return list(range(size))
        return np.argsort(hashed(np.arange(size), f"{self.seed}/window/{position}/{row}")).tolist()

    def _units_of(self, epoch: int) -> np.ndarray:
        if not self.buffer:
            return np.arange(self.units)
        if epoch not in self._shuffled:
            self._shuffled.clear()
            self._shuffled[epoch] = sample_order(self.units, self.seed, epoch, "shards")
        return self._shuffled[epoch]

    @cached_property
    def _shuffled(self) -> dict[int, np.ndarray]:
        return {}


def require_parts(parts: int, global_batch_size: int) -> None:
    """Refuse a number of parts that a global batch cannot be made of.

    Raises:
        ValueError: naming those that are legal.
    """
    if parts < 1 or global_batch_size % parts:
        legal = ", ".join(str(n) for n in range(1, global_batch_size + 1) if global_batch_size % n == 0)
        raise UserValueError(
            f"stream_parts={parts} does not divide global_batch_size={global_batch_size}; legal: {legal}"
        )
