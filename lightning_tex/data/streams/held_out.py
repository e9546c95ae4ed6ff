"""What of a stream is held out for validation: whole shards where there are enough, else rows of every shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from lightning_tex.data.streams.shards import Place, Row, Shards, required_text


@dataclass(frozen=True)
class HeldOut:
    """Which rows of a shard are held out: every ``stride``-th one; 0: none."""

    stride: int = 0

    def has(self, row: int) -> bool:
        """Whether a row is."""
        return self.stride > 0 and row % self.stride == self.stride // 2

    def before(self, row: int) -> int:
        """How many of the rows before this one are."""
        return max(0, -(-(row - self.stride // 2) // self.stride)) if self.stride else 0


NOTHING = HeldOut()


class SomeShards(Shards):
    """Some shards of others.

    Args:
        shards: all.
        numbers: of those.
    """

    def __init__(self, shards: Shards, numbers: list[int]) -> None:
        self.shards, self.numbers = shards, numbers
        self.count = len(numbers)

    def read(self, shard: int, place: Place = None) -> Iterator[tuple[Row, Place]]:
        return self.shards.read(self.numbers[shard], place)

    def name_of(self, shard: int) -> str:
        return self.shards.name_of(self.numbers[shard])


class HeldOutDocuments:
    """Documents that are held out, in their order: of each what gives its text, which takes reading only then.

    Args:
        shards: of which.
        rows: that are held out; None: all.
    """

    def __init__(self, shards: Shards, rows: HeldOut | None) -> None:
        self.shards, self.rows = shards, rows

    def __iter__(self) -> Iterator[Callable[[], str]]:
        for shard in range(self.shards.count):
            for number, (row, _) in enumerate(self.shards.read(shard)):
                if self.rows is None or self.rows.has(number):
                    yield partial(required_text, row, number, self.shards.name_of(shard))


def divided(shards: Shards, stride: int) -> tuple[Shards, HeldOut, HeldOutDocuments]:
    """Of which shards which rows are left out of training, and the documents that are held out."""
    rows = HeldOut(stride)
    if shards.count < stride:
        return shards, rows, HeldOutDocuments(shards, rows)
    chosen = [shard for shard in range(shards.count) if rows.has(shard)]
    others = [shard for shard in range(shards.count) if not rows.has(shard)]
    return SomeShards(shards, others), NOTHING, HeldOutDocuments(SomeShards(shards, chosen), None)
