"""A shard whose matrices are stepped as wholes, each by one of the ranks that have parts of it.

The order of a step, for a few matrices of the buffer at a time (``ownership.py``): gradients, combined as ever, to the
owners, where they make up whole matrices; the parameters likewise, unless the owner has an fp32 master of them; the
user's own ``step`` on the owner; and back into the ranks' parts of the buffer, which is gathered when all are through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_tex.optim.engine import Engine
from lightning_tex.optim.flat import Entry, FlatBuffer
from lightning_tex.optim.formats import LOW_PRECISION, Window
from lightning_tex.optim.gradients import Gradients
from lightning_tex.optim.matrices.costs import MatrixCosts
from lightning_tex.optim.matrices.exchange import MatrixExchange
from lightning_tex.optim.matrices.ownership import Loads, at_once, rounds
from lightning_tex.optim.matrices.states import MatrixStates
from lightning_tex.optim.matrices.units import Unit, units
from lightning_tex.optim.shard import Piece, Shard
from lightning_tex.optim.walk import Walk
from lightning_tex.parallel.device import device_type
from lightning_tex.parallel.extent import Extent


@dataclass(frozen=True, eq=False)
class MatrixPiece(Piece):
    """A whole matrix, which is a window of its own.

    Args:
        unit: the matrix.
        shard, window: see :class:`Piece`.
    """

    unit: Unit
    shard: MatrixShard
    window: int

    @property
    def entry(self) -> Entry:  # type: ignore[override]
        return self.unit.entry

    @property
    def holds_first_element(self) -> bool:
        return not self.unit.expert

    @property
    def foreseen_bytes(self) -> int:
        states = self.shard.states
        costs = self.shard.costs.of(self.unit.shape, states.dtype)
        return costs.states + costs.numbers * self.holds_first_element + 4 * self.unit.numel * states.has_master

    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.unit.stacked(shape)

    def extents(self, shape: tuple[int, ...]) -> Iterator[tuple[Extent, Callable[[Tensor], Tensor]]]:
        extent = self.unit.within_parameter(shape)
        yield extent, lambda values: values.view(extent.sizes)


class MatrixShard(Shard):
    """The parameters of one buffer, updated as whole matrices.

    Args:
        buffer, gradients, group, engine: see :class:`Shard`.
        costs: what the optimizer keeps of a matrix.
        loads: what the owners have of other buffers.
        masters: 16-bit parameters have fp32 masters.
    """

    states: MatrixStates

    def __init__(
        self,
        buffer: FlatBuffer,
        gradients: Gradients,
        group: dict[str, Any],
        engine: Engine,
        costs: MatrixCosts,
        loads: Loads,
        masters: bool,
    ) -> None:
        super().__init__(buffer, gradients, group, engine)
        self.costs = costs
        every = [unit for entry in buffer.entries for unit in units(entry)]
        (cut_axes,) = {tuple(axis for axis, _ in unit.cuts) for unit in every}  # as all are of one kind
        lengths = [unit.numel for unit in every]
        owners = loads.assign(lengths, [buffer.owners, *cut_axes])
        self.exchange = MatrixExchange(buffer, [buffer.owners, *cut_axes], dict(zip(every, owners, strict=True)))
        together = rounds(lengths, owners, at_once(device_type(buffer.parameters)))
        self.rounds = [[every[place] for place in places] for places in together]
        self.mine = [unit for some in self.rounds for unit in self.exchange.are_mine(some)]
        self._window_of = {unit: place for place, unit in enumerate(self.mine)}
        kept = masters and buffer.parameters.dtype in LOW_PRECISION
        like = buffer.parameters.new_empty(0, dtype=torch.float32 if kept else None)
        self.states = MatrixStates(self.mine, self._upcast() if kept else None, like)

    @property
    def kind(self) -> tuple[object, ...]:
        return (id(self),)

    @property
    def leaves_out(self) -> bool:
        return False

    @classmethod
    def step_together(cls, alike: Sequence[Self], walk: Walk) -> Iterator[list[Shard]]:
        for shard in alike:
            shard.refresh()
            for some in shard.rounds:
                shard._step(some, walk)
            yield [shard]

    def _step(self, some: Sequence[Unit], walk: Walk) -> None:
        values = self._values(some)
        self._update(values, some, walk)
        self.exchange.give_back(values, self.buffer.own, some)

    def _update(self, values: list[Tensor], some: Sequence[Unit], walk: Walk) -> None:
        gradients = self.exchange.collect(self.gradients.own, some)
        mine = self.exchange.are_mine(some)
        if mine:
            windows = [
                Window(nn.Parameter(value, requires_grad=False), self.states.states[self._window_of[unit]])
                for unit, value in zip(mine, values, strict=True)
            ]
            gradients = [gradient.to(values[0].dtype) for gradient in gradients]
            walk.scale_in_place(gradients, self.gradients.divisor)
            self.engine.step(windows, gradients, self.options)

    def _values(self, some: Sequence[Unit]) -> list[Tensor]:
        """What is updated of the matrices that this rank owns: masters, or the parameters, from all that have parts."""
        if self.states.masters is not None:
            return [self.states.masters[self._window_of[unit]] for unit in self.exchange.are_mine(some)]
        return self._parameters(some)

    def _parameters(self, some: Sequence[Unit]) -> list[Tensor]:
        return self.exchange.collect_replicated(self.buffer.parameters, some)

    def _upcast(self) -> list[Tensor]:
        return [value.float() for some in self.rounds for value in self._parameters(some)]

    def adopt_parameters(self) -> None:
        if self.states.masters is not None:
            self.states.masters = self._upcast()

    def keep(self) -> None:
        """Hold the states for newer, and give the parameters what was read of more precision; collective."""
        for some in self.rounds:
            values, mine = self._values(some), self.exchange.are_mine(some)
            for place, unit in enumerate(mine):
                values[place] = self.states.read.pop(self._window_of[unit], values[place])
            self.exchange.give_back(values, self.buffer.own, some)
        super().keep()

    def pieces(self) -> Iterator[MatrixPiece]:
        for place, unit in enumerate(self.mine):
            yield MatrixPiece(unit, self, place)
