"""Who failed first: reports of errors and of deaths are collected for a moment, and one of them is the cause."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from lightning_tex.resilience.processes import ProcessId

# Seconds in which errors of all ranks count as one, and in which a consequence waits for its cause.
TOGETHER_S = 1.0
# Seconds in which a dead rank's last words arrive, and those of one that died before it.
LAST_WORDS_S = 0.15


@dataclass(frozen=True)
class Report:
    """What has ended a rank.

    Args:
        rank: which.
        kind: ``error``: an exception of its own; ``consequence``: another rank has left it; ``death``: its connection
            has closed without a word.
        text: the exception's type and the first line of its message, or how the process ended.
        step: optimizer steps done.
        number: collectives begun.
    """

    rank: int
    kind: Literal["error", "consequence", "death"]
    text: str
    step: int = 0
    number: int = 0


@dataclass(frozen=True)
class Verdict:
    """Why a run ends.

    Args:
        kind: ``together``: all ranks raise at one step, and whatever needs all of them still works; ``error``,
            ``death`` or ``stall`` of some rank.
        ranks: whose fault it is.
        text: of the cause, for the others to say.
        speaker: the rank that speaks for all of them.
        doomed: processes that cannot end by themselves.
    """

    kind: Literal["together", "error", "death", "stall"]
    ranks: tuple[int, ...] = ()
    text: str = ""
    speaker: int = 0
    doomed: tuple[ProcessId, ...] = ()

    def to_message(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> Verdict:
        """The reverse of :meth:`to_message`."""
        return cls(
            message["kind"],
            tuple(message["ranks"]),
            message["text"],
            message["speaker"],
            tuple(ProcessId(*process) for process in message["doomed"]),
        )


class Deliberation:
    """The reports of one run, until one of them is the cause.

    Args:
        world: ranks.
    """

    def __init__(self, world: int) -> None:
        self._world = world
        self._reports: dict[int, Report] = {}
        self.due = float("inf")

    def add(self, report: Report, now: float) -> None:
        """Take a report in. A rank's first counts: an error on its way out is followed by its death."""
        if report.rank in self._reports:
            return
        self._reports[report.rank] = report
        self.due = min(self.due, now + (LAST_WORDS_S if report.kind == "death" else TOGETHER_S))
        if len(self._reports) == self._world:
            self.due = min(self.due, now + LAST_WORDS_S) if self._together() is None else now

    @property
    def cause(self) -> Report | None:
        """The first that is no consequence."""
        return next((report for report in self._reports.values() if report.kind != "consequence"), None)

    @property
    def first(self) -> Report | None:
        """The first of all."""
        return next(iter(self._reports.values()), None)

    def _together(self) -> Verdict | None:
        reports = self._reports.values()
        places = {(report.step, report.number) for report in reports}
        alike = len(reports) == self._world and len(places) == 1
        return Verdict("together") if alike and all(report.kind == "error" for report in reports) else None

    def together(self) -> Verdict | None:
        """Whether all ranks have raised errors of their own at one step, after the same collectives."""
        return self._together()
