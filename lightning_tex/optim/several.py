"""Several tiled optimizers of one run as one: what is saved, compared and counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from lightning_tex.optim.rounding import RoundingSeed
from lightning_tex.optim.shard import Piece, Shard
from lightning_tex.optim.skipping import Skipped
from lightning_tex.optim.tiled import TiledOptimizer
from lightning_tex.parallel.sharding import ParameterSharding


class TiledOptimizers:
    """All optimizers of a run as one.

    Args:
        each: two or more, in the order of ``configure_optimizers``, with one rounding seed.
    """

    def __init__(self, each: Sequence[TiledOptimizer]) -> None:
        self.each = list(each)

    @property
    def shardings(self) -> dict[nn.Parameter, ParameterSharding]:
        """Of the model's parameters."""
        return self.each[0].shardings

    @property
    def rounding_seed(self) -> RoundingSeed:
        """Which they share: it counts the steps of all of them."""
        return self.each[0].rounding_seed

    @property
    def shards(self) -> list[Shard]:
        """Of all of them."""
        return [shard for optimizer in self.each for shard in optimizer.shards]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """One's groups after the other's."""
        return [group for optimizer in self.each for group in optimizer.param_groups]

    @property
    def skipped(self) -> Skipped:
        """Steps of any of them that were not taken."""
        by_one = [optimizer.skipped for optimizer in self.each]
        return Skipped(sum(one.total for one in by_one), max(one.in_a_row for one in by_one))

    def pieces(self) -> Iterator[Piece]:
        """Every piece of every parameter that this rank's windows hold."""
        for optimizer in self.each:
            yield from optimizer.pieces()

    def refresh(self) -> None:
        """Take up parameters that were written from outside since the last step."""
        for optimizer in self.each:
            optimizer.refresh()

    def keep_states(self) -> None:
        """Hold the own shards' states for newer than the parameters; collective."""
        for optimizer in self.each:
            optimizer.keep_states()


Stepped = TiledOptimizer | TiledOptimizers


def as_one(each: Sequence[TiledOptimizer]) -> Stepped | None:
    """One optimizer itself, several as one; ``None``: there is none."""
    if len(each) > 1:
        return TiledOptimizers(each)
    return each[0] if each else None


def one_by_one(stepped: Stepped) -> list[TiledOptimizer]:
    """The optimizers, in the order of ``configure_optimizers``."""
    return stepped.each if isinstance(stepped, TiledOptimizers) else [stepped]
