"""What each rank knows of a step that was not taken, and what all ranks say of it together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RankReport:
    """What one rank knows of a step that was not taken.

    Args:
        loss_is_finite: of the rank's own loss.
        order: of the first tensor that was not finite, to compare ranks by; ``None``: none was seen, or not looked for.
        what: that tensor, in words.
        parameter: a parameter that is not finite itself, in words.
        in_module: whether that is a parameter of the module that gave the tensor.
        batch: which batch the rank had.
    """

    loss_is_finite: bool
    order: int | None
    what: str
    parameter: str | None
    in_module: bool
    batch: str


def told(reports: list[RankReport]) -> str | None:
    """Of all ranks' reports the earliest, in words: the same on all ranks."""
    seen = [(r.order, not r.in_module, rank) for rank, r in enumerate(reports) if r.order is not None]
    if seen:
        order, _, guilty = min(seen)
        report = reports[guilty]
        also = [rank for at, lacks, rank in seen if at == order and lacks == (not report.in_module)]
        told = f"{report.what} on rank(s) {', '.join(map(str, also))}"
        if report.in_module:
            told += f", whose parameter {report.parameter} is not finite itself"
        return f"{told}; {report.batch}"
    for rank, report in enumerate(reports):
        if report.parameter is not None:
            return f"the parameter {report.parameter} on rank {rank}; {report.batch}"
    ranks = [rank for rank, report in enumerate(reports) if not report.loss_is_finite]
    if not ranks:
        return None
    return f"the loss on rank(s) {', '.join(map(str, ranks))}; {reports[ranks[0]].batch}"
