"""Where a rank is: the flight record in a form that travels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from time import monotonic
from typing import Any, NamedTuple

from lightning_tex.parallel.flight_record import ALIKE, RECORDS, TRAINING, Call, FlightRecord


class Entry(NamedTuple):
    """A collective; see :class:`~lightning_tex.parallel.flight_record.Call`."""

    number: int
    operation: str
    axis: str
    shape: list[int] | None
    dtype: str | None
    layer: str
    step: int

    @classmethod
    def of(cls, call: Call) -> Entry:
        shape = None if call.shape is None else list(call.shape)
        dtype = None if call.dtype is None else str(call.dtype).removeprefix("torch.")
        return cls(call.number, call.operation, call.axis.name, shape, dtype, call.layer, call.step)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What ranks that call it together have in common."""
        tensor = (self.dtype, tuple(self.shape)) if self.shape is not None and self.operation in ALIKE else ()
        return (self.operation, self.axis, *tensor)

    def __str__(self) -> str:
        tensor = "" if self.shape is None else f" of {self.dtype} {self.shape}"
        return f"#{self.number} {self.operation} over {self.axis}{tensor}" + (f" in {self.layer}" if self.layer else "")


@dataclass(frozen=True)
class Track:
    """The collectives of one thread.

    Args:
        name: of the thread's work.
        waits_for: the collective it is in.
        seconds: since when it waits, or since the last one has returned.
        calls: the last ones, the oldest first.
    """

    name: str
    waits_for: Entry | None
    seconds: float
    calls: list[Entry] = field(default_factory=list)


@dataclass(frozen=True)
class Where:
    """Where one rank is.

    Args:
        step: optimizer steps done.
        tracks: of its threads.
        groups: the ranks of its group on each axis; none for all ranks.
    """

    step: int
    tracks: list[Track]
    groups: dict[str, list[int]]

    @classmethod
    def now(cls, device_waits: Callable[[], bool]) -> Where:
        """Of this process.

        Args:
            device_waits: whether the device has work that does not end, so that the last collective is one that waits.
        """
        groups: dict[str, list[int]] = {}
        tracks = [_track(record, device_waits, groups) for record in RECORDS if record.number]
        return cls(TRAINING.step, tracks, groups)

    def to_message(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> Where:
        """The reverse of :meth:`to_message`."""
        tracks = [
            Track(
                track["name"],
                None if track["waits_for"] is None else _entry(track["waits_for"]),
                track["seconds"],
                [_entry(entry) for entry in track["calls"]],
            )
            for track in message["tracks"]
        ]
        return cls(message["step"], tracks, message["groups"])

    @property
    def waiting(self) -> list[Track]:
        """The threads that wait in a collective."""
        return [track for track in self.tracks if track.waits_for is not None]

    def track(self, name: str) -> Track | None:
        """The thread of that work."""
        return next((track for track in self.tracks if track.name == name), None)


def _entry(fields: Iterable[Any]) -> Entry:
    return Entry(*fields)


def _track(record: FlightRecord, device_waits: Callable[[], bool], groups: dict[str, list[int]]) -> Track:
    calls = record.last_calls
    groups.update({call.axis.name: list(call.axis.ranks) for call in calls})
    waits_for = record.waiting_for
    if waits_for is None and record is TRAINING and calls and device_waits():
        waits_for = calls[-1]
    entries = [Entry.of(call) for call in calls]
    return Track(record.name, Entry.of(waits_for) if waits_for else None, monotonic() - record.since, entries)
