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
        kind: ``together``: all ranks raise at one place, and whatever needs all of them still works; ``apart``: all
            raise errors of their own at different ones; ``error``, ``death`` or ``stall`` of some rank.
        ranks: whose fault it is.
        text: of the cause, for the others to say; of errors of all ranks, if they are alike.
        speaker: the rank that speaks for all of them.
        doomed: processes that cannot end by themselves.
    """

    kind: Literal["together", "apart", "error", "death", "stall"]
    ranks: tuple[int, ...] = ()
    text: str = ""
    speaker: int = 0
    doomed: tuple[ProcessId, ...] = ()

    @property
    def ends_others(self) -> bool:
        """Whether ranks that have not failed themselves have to end."""
        return self.kind in ("error", "death", "stall")

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
            self.due = now

    @property
    def cause(self) -> Report | None:
        """The first that is no consequence."""
        return next((report for report in self._reports.values() if report.kind != "consequence"), None)

    @property
    def first(self) -> Report | None:
        """The first of all."""
        return next(iter(self._reports.values()), None)

    @property
    def reported(self) -> set[int]:
        """The ranks that reports are of."""
        return set(self._reports)

    def of_all(self) -> Verdict | None:
        """What there is to say where all ranks have raised errors of their own."""
        reports = self._reports.values()
        if len(reports) < self._world or any(report.kind != "error" for report in reports):
            return None
        places = {(report.step, report.number) for report in reports}
        texts = {report.text for report in reports}
        return Verdict("together" if len(places) == 1 else "apart", text=texts.pop() if len(texts) == 1 else "")
