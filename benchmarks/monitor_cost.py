"""What ExpertMonitor costs beside a step of a recipe: in turns with steps that it does not see, in the same run.

    python benchmarks/monitor_cost.py [--config recipes/quickstart.yaml] [--turns 12]

One process. A turn is two periods of logging, one that the monitor sees and one that it does not, in an order that
changes. Printed are the processor time of a step, all threads; by how much a turn's one period is above its other, the
median over turns and quartiles; and the time on the clock inside the monitor's hooks, for each step that it sees.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger

from lightning_tex.callbacks import ExpertMonitor
from lightning_tex.moe import MoE
from lightning_tex.recipe import BARE_TRAINER, Recipe, quiet

WARM_UP = 2  # turns that do not count


class InTurns(ExpertMonitor):
    """A monitor that sees two of four periods of logging, and takes the time.

    Args:
        period: steps between two logs.
    """

    def __init__(self, period: int) -> None:
        super().__init__()
        self.period = period
        self.processor: list[float] = []  # at the begin of each period
        self.hooks: list[float] = []  # seconds in them, of each call

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *given: Any) -> None:
        if trainer.global_step % self.period == 0:
            self.processor.append(time.process_time())
        if seen(trainer.global_step // self.period):
            self._timed(super().on_train_batch_start, trainer, module, *given)
        else:
            for layer in (each for each in module.modules() if isinstance(each, MoE)):
                layer.load.looks_at_scores = False

    def on_train_batch_end(self, trainer: L.Trainer, *given: Any) -> None:
        if seen((trainer.global_step - 1) // self.period):
            self._timed(super().on_train_batch_end, trainer, *given)

    def _timed(self, hook: Callable[..., None], *given: Any) -> None:
        began = time.perf_counter()
        hook(*given)
        self.hooks.append(time.perf_counter() - began)


def seen(period: int) -> bool:
    """Whether the monitor sees it: the first of one turn, the second of the next."""
    return period % 4 in (0, 3)


def measured(config: str, turns: int) -> tuple[int, list[float], float]:
    """Steps in a period, its processor seconds by period, and a step's seconds in hooks."""
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")  # Lightning's own use
    with quiet(), tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(config)
        period = recipe.config.trainer.log_every_n_steps or 50
        monitor = InTurns(period)
        steps = 2 * (WARM_UP + turns) * period + 1
        given = {**BARE_TRAINER, "devices": 1, "max_steps": steps, "max_epochs": -1, "limit_val_batches": 0}
        fit = recipe.instantiate({"tensor_parallel_size": 1, "expert_parallel_size": 1}, given)
        fit.trainer.loggers = [CSVLogger(folder)]
        fit.model.configure_callbacks = lambda: [monitor]
        fit.trainer.fit(fit.model, fit.datamodule)
    periods = [after - before for before, after in pairwise(monitor.processor)]
    hooks = monitor.hooks[len(monitor.hooks) * WARM_UP // (WARM_UP + turns) :]
    return period, periods[2 * WARM_UP :], 2 * statistics.mean(hooks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="recipes/quickstart.yaml")
    parser.add_argument("--turns", type=int, default=12)
    options = parser.parse_args()
    period, periods, hooks = measured(options.config, options.turns)
    of_turns = []
    for turn, pair in enumerate(zip(periods[::2], periods[1::2], strict=True)):
        watched, alone = pair if seen(2 * turn) else pair[::-1]
        of_turns.append(watched / alone - 1)
    step = statistics.median(periods) / period
    low, middle, high = statistics.quantiles(of_turns, n=4)
    print(f"{len(of_turns)} turns of 2 x {period} steps, one process; {1e3 * step:.1f} ms of processor time a step")
    print(f"with the monitor {middle:+.2%} (quartiles {low:+.2%} to {high:+.2%})")
    print(f"in its hooks {1e6 * hooks:.0f} us a step, {hooks / step:.3%}")


if __name__ == "__main__":
    main()
