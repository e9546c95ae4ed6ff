"""One rank's part of a buffer: what a step updates, window by window."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

from lightning_tex.optim.engine import Held
from lightning_tex.optim.flat import Entry, FlatBuffer
from lightning_tex.optim.flat_sizes import batched
from lightning_tex.optim.formats import StateFormat
from lightning_tex.optim.gradients import Gradients
from lightning_tex.parallel.errors import UserRuntimeError
from lightning_tex.parallel.extent import Extent
from lightning_tex.parallel.sharding import ParameterSharding


class Piece(NamedTuple):
    """The elements of a parameter that one window of a shard holds.

    Args:
        entry: the parameter.
        stored: the elements in the parameter's stored, flattened part.
        shard, window: what holds them.
        held: the same elements in the window.
    """

    entry: Entry
    stored: Extent
    shard: Shard
    window: int
    held: Extent

    @property
    def sharding(self) -> ParameterSharding:
        """Of the parameter."""
        return self.entry.sharding

    @property
    def writes(self) -> bool:
        """Whether this rank is the replica that saves it: its owner or, where all are, the first."""
        return self.shard.buffer.owners.size == self.sharding.replicas.size or self.sharding.replicas.rank == 0


class Shard:
    """The own part of one buffer, its gradients and its states.

    Args:
        buffer: the parameters.
        gradients: theirs.
        states: the states, and the windows (tiles) that a step walks.
        group: the optimizer group it belongs to; its options are read at every step.
    """

    def __init__(self, buffer: FlatBuffer, gradients: Gradients, states: StateFormat, group: dict[str, Any]) -> None:
        self.buffer, self.gradients, self.states, self.group = buffer, gradients, states, group
        self._versions = self._current_versions()

    @property
    def kind(self) -> tuple[object, ...]:
        """What shards have in common whose windows may be stepped in one call."""
        return id(self.group), self.gradients.divisor, self.states.own.dtype

    def held(self) -> list[Held]:
        """The windows with their gradients, to be stepped."""
        own, spans, divisor = self.gradients.own, self.states.spans, self.gradients.divisor
        return [Held(self.states, i, own[span] if len(spans) > 1 else own, divisor) for i, span in enumerate(spans)]

    def refresh(self) -> None:
        """Take up parameters that somebody else wrote since the last step (a loaded state dict, a callback)."""
        versions = self._current_versions()
        if versions != self._versions:
            self.states.adopt_parameters()
        self._versions = versions

    def keep(self) -> None:
        """Hold the states for newer than the parameters, whoever wrote those."""
        self._versions = self._current_versions()

    def _current_versions(self) -> list[int]:
        # Our own writes go through the buffer and do not count here.
        return [entry.parameter._version for entry in self.buffer.entries]

    def pieces(self) -> Iterator[Piece]:
        """Every piece of every parameter that the windows hold."""
        for i, span in enumerate(self.states.spans):
            window = Extent.run(span.start, span.stop).shift([self.buffer.own_start])
            for entry in self.buffer.entries:
                common = entry.extent.intersect(window)
                if common.numel:
                    yield Piece(entry, common.within(entry.extent), self, i, common.within(window))


class Batch(NamedTuple):
    """Windows that are stepped in one call.

    Args:
        group: the optimizer group of all.
        windows: together as many elements as one window may have.
        complete: shards of which no window is left afterwards.
    """

    group: dict[str, Any]
    windows: list[Held]
    complete: list[Shard]


def batches(shards: Iterable[Shard]) -> Iterator[Batch]:
    """All windows of some shards, in their order; shards take up what somebody else wrote."""
    for _, run in groupby(shards, lambda shard: shard.kind):
        alike, windows, ends = list(run), [], []
        for shard in alike:
            shard.refresh()
            windows += shard.held()
            ends.append(len(windows))
        lengths = [len(window.gradient) for window in windows]
        for span in batched(lengths, alike[0].states.tile_size):
            complete = [shard for shard, end in zip(alike, ends, strict=True) if span.start < end <= span.stop]
            yield Batch(alike[0].group, windows[span], complete)


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
