"""What came of the layouts that were compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lightning_tex.parallel.layout import Layout
from lightning_tex.testing.differences import Difference
from lightning_tex.testing.layouts import Run

Status = Literal["alike", "differs", "failed", "not tried"]


@dataclass(frozen=True)
class Verdict:
    """What came of one layout.

    Args:
        run: processes and arguments of the strategy.
        layout: sizes of all axes; ``None`` if it is not legal.
        first: the first difference in the order loss, gradients, gradient norm, and at the end parameters.
        worst: the largest difference by kind: ``loss``, ``gradients``, ``gradient norm``, ``parameters``.
        error: what was raised.
        reason: what is likely to be wrong.
        skipped: why it could not be tried.
    """

    run: Run
    layout: Layout | None = None
    first: Difference | None = None
    worst: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    reason: str | None = None
    skipped: str | None = None

    @property
    def status(self) -> Status:
        """``alike``, ``differs``, ``failed`` (raised, hung or not legal) or ``not tried``."""
        if self.skipped is not None:
            return "not tried"
        if self.error is not None:
            return "failed"
        return "alike" if self.first is None else "differs"

    @property
    def alike(self) -> bool:
        """Whether the layout trains as one process does."""
        return self.status == "alike"

    def __str__(self) -> str:
        if self.status == "not tried":
            return f"{self.run}: could not be tried: {self.skipped}"
        if self.status == "alike":
            return f"{self.run}: alike, worst difference {max(self.worst.values(), default=0.0):.2g}"
        lines = [f"{self.run}: " + (self.error or str(self.first))]
        return "\n    likely: ".join([*lines, self.reason] if self.reason else lines)


def complaint(verdicts: Sequence[Verdict], named: bool) -> str | None:
    """What speaks against the module; ``None`` if nothing does.

    A layout that could not be tried does only where its caller named it, or where no layout could be tried.

    Args:
        verdicts: on all layouts.
        named: whether the caller named these layouts, rather than all legal ones.
    """
    wrong = [verdict for verdict in verdicts if verdict.status in ("differs", "failed")]
    untried = [verdict for verdict in verdicts if verdict.status == "not tried"]
    untried = untried if named or len(untried) == len(verdicts) else []
    told = []
    if wrong:
        told += [f"{len(wrong)} of {len(verdicts)} layouts do not train as one process does:", *_listed(wrong)]
    if untried:
        told += [f"{len(untried)} of {len(verdicts)} layouts could not be tried:", *_listed(untried)]
    return "\n".join(told) or ("there is no layout to try" if not verdicts else None)


def _listed(verdicts: Sequence[Verdict]) -> list[str]:
    return [f"  {verdict}" for verdict in verdicts]
