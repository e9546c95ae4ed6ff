"""Validation, test and predict with unequal numbers of batches: ranks that are done keep taking part.

A mixture-of-experts forward needs every rank of the expert axis, so a rank without batches repeats its last one, and
nothing of the repetition remains: no output, no logged value, no metric update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from lightning import LightningModule
from torchmetrics import Metric

from lightning_tex.parallel.errors import UserRuntimeError
from lightning_tex.parallel.topology import Axis
from lightning_tex.resilience.star import current_star
from lightning_tex.resilience.vote import Vote
from lightning_tex.strategy.batches import gather_numbers

# Than any evaluation has.
_MORE_LOADERS = 1 << 20


def run_until_all_are_done(module: LightningModule, step: Callable[[], Any], loader: int, host: Axis) -> None:
    """After a rank's own step: return if it has more, else repeat ``step`` until no rank has more; collective.

    Args:
        module: the module being evaluated.
        step: its last step, arguments included.
        loader: number of the data loader the batch came from.
        host: all ranks over the host's network.

    Raises:
        RuntimeError: ranks are in different data loaders, which their epoch ends would make hang.
    """
    if host.size == 1:
        return
    trainer = module.trainer
    loop: Any = trainer.predict_loop if trainer.predicting else trainer._evaluation_loop
    last = bool(loop.batch_progress.is_last_batch)
    vote = Vote(host, current_star())
    while True:
        goes_on, latest, earliest = vote.highest(not last, loader, _MORE_LOADERS - loader)
        if latest.number != _MORE_LOADERS - earliest.number:
            by_rank = [index for (index,) in gather_numbers([loader], host)]
            raise UserRuntimeError(
                "Ranks are in different evaluation data loaders because a loader has unequal numbers of batches: "
                f"{by_rank} by rank. Use one loader, or equal lengths"
            )
        if not last or not goes_on.number:
            return
        with _leaving_no_trace(module):
            step()


@contextmanager
def _leaving_no_trace(module: LightningModule) -> Iterator[None]:
    metrics = [m for m in module.modules() if isinstance(m, Metric)]
    results = module.trainer._results
    if results is not None:
        metrics += list(results.values())
    kept = [{key: deepcopy(value) for key, value in _state(metric).items()} for metric in metrics]
    try:
        yield
    finally:
        for metric, state in zip(metrics, kept, strict=True):
            metric.__dict__.update(state)


def _state(metric: Metric) -> dict[str, Any]:
    kept = {*metric._defaults, "_update_count", "_computed", "_forward_cache", "has_reset"}
    return {key: value for key, value in metric.__dict__.items() if key in kept}
