"""Names logged with ``sync_dist=True`` are compared over ranks before their values are reduced with each other.

A name that one rank alone logs would leave it waiting, or be averaged with another name's values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning import Trainer

from lightning_tex.resilience.agreement import Agreement, Comparison

_COMPLAINT = "ranks log different names with sync_dist=True"
_REMEDY = "Log the same names in the same order on every rank, or with sync_dist=False"


class LoggedNames:
    """Compares a name of a step when it is first reduced, and those of an epoch when they are first reduced together.

    Ranks that reduce nothing come to the comparison by :meth:`step_ends`.

    Args:
        agreement: over the ranks whose values are reduced with each other.
    """

    def __init__(self, agreement: Agreement) -> None:
        self._agreement = agreement
        self._agreed: set[tuple[Any, ...]] = set()

    def reduction_begins(self, trainer: Trainer) -> None:
        """Before a reduction over the data axis, of a logged value or of another tensor."""
        results = trainer._results
        if not results:
            return
        if trainer._logger_connector._first_loop_iter is None:  # between epochs, where all names are reduced in order
            self._agree_once("the end of an epoch", *_epoch_names(results))
            return
        key = next(reversed(results))
        meta = results[key].meta
        if meta.on_step and _is_reduced(results[key]):
            self._agree_once(f"self.log({meta.name!r}, sync_dist=True) in {meta.fx}", key)

    def step_ends(self) -> None:
        """After one of the first steps of a stage, which all ranks take."""
        self._agreement.require(Comparison("the end of a step", {}, _COMPLAINT, _REMEDY, {}))

    def _agree_once(self, occasion: str, *names: str) -> None:
        if names and (occasion, *names) not in self._agreed:
            self._agreed.add((occasion, *names))
            facts = {"the list of names": ", ".join(names)}
            self._agreement.require(Comparison(occasion, facts, _COMPLAINT, _REMEDY, {}))


def _epoch_names(results: Any) -> Iterator[str]:
    for key, metric in results.valid_items():
        if metric.meta.on_epoch and _is_reduced(metric):
            yield key


def _is_reduced(metric: Any) -> bool:
    """Whether the values of a result are reduced over the data axis; those of torchmetrics go ways of their own."""
    sync = metric.meta.sync
    return metric.is_tensor and sync.should and not sync.rank_zero_only and sync.group is None
