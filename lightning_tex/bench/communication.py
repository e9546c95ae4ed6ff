"""A recipe's training step under every combination of communication options."""

from __future__ import annotations

import gc
import os
import statistics
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_tex.bench.combinations import Combination
from lightning_tex.bench.stopwatch import Measured, Stopwatch
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.recipe import BARE_TRAINER, Recipe, quiet
from lightning_tex.strategy import TexMoEStrategy


class CommunicationBench:
    """Runs a recipe under combinations, each with a Trainer of its own on the same processes.

    Args:
        recipe: the recipe.
        warmup: steps before the clock starts.
        steps: steps timed together.
        baseline: the combination that the others are compared with.
    """

    def __init__(self, recipe: Recipe, warmup: int, steps: int, baseline: str = "baseline") -> None:
        self.recipe, self.warmup, self.steps, self.baseline = recipe, warmup, steps, baseline
        self.runs: dict[str, list[Measured]] = {}
        self.skipped: dict[str, str] = {}
        self.is_first_rank = True
        self._layouts: list[str] = []

    def turn(self, combinations: Mapping[str, Combination]) -> None:
        """Run every combination once. Collective over the recipe's ranks."""
        for name, combination in combinations.items():
            if name in self.skipped:
                continue
            try:
                self.runs.setdefault(name, []).append(self._run(combination))
            except (ValueError, MisconfigurationException) as error:
                if name == self.baseline:
                    raise
                del self.runs[name]
                self.skipped[name] = str(error)

    def _run(self, combination: Combination) -> Measured:
        sizes = self.recipe.strategy_options()
        tensor, expert = sizes.get("tensor_parallel_size", 1), sizes.get("expert_parallel_size", "auto")
        watch = Stopwatch(self.warmup, self.steps)
        with quiet():
            fit = self.recipe.instantiate(
                strategy=combination.options(tensor, expert),
                trainer={
                    **BARE_TRAINER,
                    "max_steps": self.warmup + self.steps,
                    "max_epochs": -1,
                    "limit_train_batches": 1.0,
                    "limit_val_batches": 0,
                    "num_sanity_val_steps": 0,
                },
            )
        strategy = fit.trainer.strategy
        assert isinstance(strategy, TexMoEStrategy)
        strategy.adopt(combination.communication(strategy.communication))
        fit.trainer.callbacks.append(watch)  # type: ignore[attr-defined]
        with on_the_same_processes(strategy), quiet():
            fit.trainer.fit(fit.model, fit.datamodule)
        self.is_first_rank = strategy.is_global_zero
        if (layout := str(strategy.topology.layout)) not in self._layouts:
            self._layouts.append(layout)
        del fit
        gc.collect()
        if watch.measured is None:
            raise UserValueError(
                f"the recipe's data ended before {self.warmup} + {self.steps} optimizer steps; "
                "legal: smaller --warmup and --steps"
            )
        return watch.measured

    def report(self) -> dict[str, Any]:
        """Medians over the turns, and ratios to the baseline of the same run."""
        base = statistics.median(run.step_ms for run in self.runs[self.baseline])
        rows = {}
        for name, runs in self.runs.items():
            step_ms, first = statistics.median(run.step_ms for run in runs), runs[0]
            by_axis: dict[str, float] = {}
            for kind, count in first.sent_bytes.items():
                axis = kind.split("/")[1]
                by_axis[axis] = by_axis.get(axis, 0.0) + count
            rows[name.strip()] = {
                "step_ms": step_ms,
                "step_ms_all": [run.step_ms for run in runs],
                "speedup": base / step_ms,
                "cpu_ms_per_step_all_ranks": statistics.median(run.cpu_ms for run in runs),
                "sent_bytes_by_axis": by_axis,
                "sent_bytes": first.sent_bytes,
                "stash_bytes_by_block": first.stash_bytes,
                "loss": first.loss,
            }
        return {
            "recipe": self.recipe.path,
            "layouts": self._layouts,
            "steps": self.steps,
            "turns": max(map(len, self.runs.values())),
            "combinations": rows,
            "skipped": {name.strip(): reason for name, reason in self.skipped.items()},
        }


class on_the_same_processes:
    """What Lightning sets up and tears down for one Trainer outlives it: the next one finds itself launched already."""

    def __init__(self, strategy: TexMoEStrategy) -> None:
        self.strategy = strategy

    def __enter__(self) -> None:
        self.before = dict(os.environ)

    def __exit__(self, *_: object) -> None:
        environment = self.strategy.cluster_environment
        if environment is None:
            return
        os.environ.update(self.before)
        if not environment.creates_processes_externally:
            os.environ.update(
                LOCAL_RANK=str(self.strategy.local_rank),
                NODE_RANK=str(self.strategy.node_rank),
                WORLD_SIZE=str(self.strategy.world_size),
                MASTER_ADDR=environment.main_address,
                MASTER_PORT=str(environment.main_port),
            )
