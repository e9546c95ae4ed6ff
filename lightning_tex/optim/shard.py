"""One rank's part of a buffer: what a step updates, window by window."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, Self

from torch import Tensor

from lightning_tex.optim.engine import Engine, Held, fastest
from lightning_tex.optim.flat import Entry, FlatBuffer
from lightning_tex.optim.flat_sizes import batched
from lightning_tex.optim.formats import KeptStates, StateFormat
from lightning_tex.optim.gradients import Gradients
from lightning_tex.optim.walk import Walk
from lightning_tex.parallel.errors import UserRuntimeError
from lightning_tex.parallel.extent import Extent
from lightning_tex.parallel.sharding import ParameterSharding


class Piece(ABC):
    """Elements of a parameter that one window of a shard holds.

    Attributes:
        entry: the parameter.
        shard, window: what holds them.
    """

    entry: Entry
    shard: Shard
    window: int

    @property
    def sharding(self) -> ParameterSharding:
        """Of the parameter."""
        return self.entry.sharding

    @property
    def writes(self) -> bool:
        """Whether this rank is the replica that saves it: its owner or, where all are, the first."""
        return self.shard.buffer.owners.size == self.sharding.replicas.size or self.sharding.replicas.rank == 0

    @property
    @abstractmethod
    def holds_first_element(self) -> bool:
        """Of the parameter: true once over replicas and sharded axes."""

    @property
    @abstractmethod
    def foreseen_bytes(self) -> int:
        """What a checkpoint has of its states once it has been stepped."""

    @abstractmethod
    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Global shape, of the parameter, of a state that has this shape in the window."""

    @abstractmethod
    def extents(self, shape: tuple[int, ...]) -> Iterator[tuple[Extent, Callable[[Tensor], Tensor]]]:
        """Which elements of the whole state these are, each with what gives a view of them from the window's state."""


class Shard(ABC):
    """The own part of one buffer, its gradients and its states.

    Args:
        buffer: the parameters.
        gradients: theirs.
        group: the optimizer group it belongs to; its options are read at every step.
        engine: steps them.

    Attributes:
        states: what is kept of them, window by window.
    """

    states: KeptStates

    def __init__(self, buffer: FlatBuffer, gradients: Gradients, group: dict[str, Any], engine: Engine) -> None:
        self.buffer, self.gradients, self.group, self.engine = buffer, gradients, group, engine
        self._versions = self._current_versions()

    @property
    @abstractmethod
    def kind(self) -> tuple[object, ...]:
        """What shards have in common that may be stepped together."""

    @property
    @abstractmethod
    def leaves_out(self) -> bool:
        """Whether a step that a scalar on the device says is not taken is left out without the host's knowing."""

    @classmethod
    @abstractmethod
    def step_together(cls, alike: Sequence[Self], walk: Walk) -> Iterator[list[Shard]]:
        """Step shards of one kind; gives those that are through, as soon as they are. Collective."""

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """Every piece of every parameter that the windows hold."""

    @property
    def options(self) -> dict[str, Any]:
        """What it is stepped with: its group's options, with the kernel that is chosen."""
        return fastest(self.engine.optimizer, self.group)

    @abstractmethod
    def adopt_parameters(self) -> None:
        """Take the parameters for the truth: somebody else wrote them. Collective."""

    def refresh(self) -> None:
        """Take up parameters that somebody else wrote since the last step (a loaded state dict, a callback)."""
        replaced = self.buffer.take_back()
        versions = self._current_versions()
        if replaced or versions != self._versions:
            self.adopt_parameters()
        self._versions = versions

    def keep(self) -> None:
        """Hold the states for newer than the parameters, whoever wrote those; collective."""
        self._versions = self._current_versions()

    def _current_versions(self) -> list[int]:
        # Our own writes go through the buffer and do not count here.
        return [entry.parameter._version for entry in self.buffer.entries]


@dataclass(frozen=True, eq=False)
class TiledPiece(Piece):
    """A piece of a window that cuts through parameters.

    Args:
        entry, shard, window: see :class:`Piece`.
        stored: the elements in the parameter's stored, flattened part.
        held: the same elements in the window.
    """

    entry: Entry
    stored: Extent
    shard: TiledShard
    window: int
    held: Extent

    @property
    def holds_first_element(self) -> bool:
        return not any(self.stored.offsets) and not any(self.sharding.box.extent.offsets)

    @property
    def foreseen_bytes(self) -> int:
        saved, elements = self.shard.states.saved_size, sum(extent.numel for extent, _ in self.extents(()))
        return saved.per_element * elements + saved.per_parameter * self.holds_first_element

    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.sharding.box.full

    def extents(self, shape: tuple[int, ...]) -> Iterator[tuple[Extent, Callable[[Tensor], Tensor]]]:
        yield from self.sharding.box.of_run(self.stored, self.held.offsets[0])


class TiledShard(Shard):
    """A shard that is stepped in tiles, windows of consecutive elements.

    Args:
        buffer, gradients, group, engine: see :class:`Shard`.
        states: the states, and the windows (tiles) that a step walks.
    """

    states: StateFormat

    def __init__(
        self, buffer: FlatBuffer, gradients: Gradients, group: dict[str, Any], engine: Engine, states: StateFormat
    ) -> None:
        super().__init__(buffer, gradients, group, engine)
        self.states = states

    @property
    def kind(self) -> tuple[object, ...]:
        return id(self.group), self.gradients.divisor, self.states.own.dtype

    @property
    def leaves_out(self) -> bool:
        return self.engine.leaves_out(self.states, self.group)

    @classmethod
    def step_together(cls, alike: Sequence[Self], walk: Walk) -> Iterator[list[Shard]]:
        for windows, complete in batches(alike):
            if windows:
                alike[0].engine.step_windows(windows, walk, alike[0].options)
            yield complete

    def held(self) -> list[Held]:
        """The windows with their gradients, to be stepped."""
        own, spans, divisor = self.gradients.own, self.states.spans, self.gradients.divisor
        return [Held(self.states, i, own[span] if len(spans) > 1 else own, divisor) for i, span in enumerate(spans)]

    def adopt_parameters(self) -> None:
        self.states.adopt_parameters()

    def pieces(self) -> Iterator[TiledPiece]:
        for i, span in enumerate(self.states.spans):
            window = Extent.run(span.start, span.stop).shift([self.buffer.own_start])
            for entry in self.buffer.entries:
                common = entry.extent.intersect(window)
                if common.numel:
                    yield TiledPiece(entry, common.within(entry.extent), self, i, common.within(window))


class Batch(NamedTuple):
    """Windows that are stepped in one call.

    Args:
        windows: together as many elements as one window may have.
        complete: shards of which no window is left afterwards.
    """

    windows: list[Held]
    complete: list[Shard]


def batches(alike: Sequence[TiledShard]) -> Iterator[Batch]:
    """All windows of shards of one kind, in their order; shards take up what somebody else wrote."""
    windows, ends = [], []
    for shard in alike:
        shard.refresh()
        windows += shard.held()
        ends.append(len(windows))
    lengths = [len(window.gradient) for window in windows]
    for span in batched(lengths, alike[0].states.tile_size):
        complete = [shard for shard, end in zip(alike, ends, strict=True) if span.start < end <= span.stop]
        yield Batch(windows[span], list(complete))


def by_kind(shards: Iterable[Shard]) -> Iterator[list[Shard]]:
    """Consecutive shards that are stepped together."""
    for _, run in groupby(shards, lambda shard: shard.kind):
        yield list(run)


def regroup(shards: Iterable[Shard], groups: Iterable[dict[str, Any]]) -> None:
    """Let shards belong to other groups, which hold the same parameters together.

    Raises:
        RuntimeError: groups that tear apart what lies in one buffer, or leave some of it out.
    """
    group_of = {parameter: group for group in groups for parameter in group["params"]}
    for shard in shards:
        found = {id(group): group for group in (group_of.get(entry.parameter) for entry in shard.buffer.entries)}
        group, *others = found.values()
        if group is None or others:
            names = ", ".join(entry.sharding.name for entry in shard.buffer.entries[:4])
            raise UserRuntimeError(
                f"param_groups of the optimizer were replaced by groups that part {names}, .., which lie together; "
                "legal: groups that keep those of before together, and others beside them"
            )
        shard.group = group
