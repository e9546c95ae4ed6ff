"""What keeps a run trustworthy, beside a step of a recipe: counted in a run, timed alone on the same ranks.

    python benchmarks/cost_of_trust.py [--config recipes/quickstart.yaml] [--steps 20]

Every optimizer step has a vote about stopping, an entry in the flight record for each collective and a look at the
batch's token ids; copies are compared after some steps. Times are medians, of processor and of the clock, on rank 0;
what a vote waits for a slower rank is not a cost, since the next collective would wait as long.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch.distributed as dist

from lightning_tex.data import require_token_ids
from lightning_tex.parallel.flight_record import EVERY_RANK, TRAINING
from lightning_tex.recipe import BARE_TRAINER, Recipe, quiet
from lightning_tex.resilience.replicas import differing
from lightning_tex.resilience.star import current_star
from lightning_tex.resilience.vote import Vote
from lightning_tex.strategy import TexMoEStrategy
from lightning_tex.strategy.replica_checks import copies
from lightning_tex.testing import run_ranks

PERIOD = 100  # steps between two comparisons of copies, the default


def microseconds(work: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median over five rounds of a call's time on the clock and on the processor, all ranks doing the same."""
    clock, processor = [], []
    for _ in range(5):
        dist.barrier()
        began, used = time.perf_counter(), time.thread_time()
        for _ in range(repeats):
            work()
        clock.append((time.perf_counter() - began) / repeats * 1e6)
        processor.append((time.thread_time() - used) / repeats * 1e6)
    return statistics.median(clock), statistics.median(processor)


def record() -> None:
    TRAINING.enter("all_reduce", EVERY_RANK)
    TRAINING.leave()


class Costs(L.Callback):
    """Times steps, counts collectives in them, and then times the safeguards alone.

    Args:
        warmup: steps that do not count.
        steps: steps that do.
    """

    def __init__(self, warmup: int, steps: int) -> None:
        self.warmup, self.last = warmup, warmup + steps
        self.times: list[float] = []
        self.numbers: list[int] = []
        self.votes = 0
        self.found: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, _: Any, batch: Any, *__: Any) -> None:
        if self.numbers:
            since = self.numbers[-1]
            self.votes += sum(call.operation == "vote" and call.number > since for call in TRAINING.last_calls)
        if trainer.global_step >= self.warmup:
            self.times.append(time.perf_counter())
            self.numbers.append(TRAINING.number)
        if trainer.global_step == self.last:
            self.found = self._alone(TexMoEStrategy.of(trainer), module, batch)

    def _alone(self, strategy: TexMoEStrategy, module: Any, batch: Any) -> dict[str, Any]:
        steps = len(self.times) - 1
        vote = Vote(strategy.topology.host, current_star())
        optimizer = strategy.tiled_optimizer
        assert optimizer is not None

        def compare() -> None:
            differing(list(copies(module, strategy.topology, optimizer)), strategy.topology)

        return {
            "step": (self.times[-1] - self.times[0]) / steps * 1e6,
            "collectives": (self.numbers[-1] - self.numbers[0]) / steps,
            "votes": self.votes / steps,
            "vote": microseconds(lambda: vote.highest(0, 0), 200),
            "record": microseconds(record, 2000),
            "ids": microseconds(lambda: require_token_ids(batch, module.config.vocab_size, -100, "batch"), 200),
            "compare": microseconds(compare, 5),
        }


def measured(config: str, warmup: int, steps: int) -> dict[str, Any]:
    costs = Costs(warmup, steps)
    with quiet():
        fit = Recipe(config).instantiate(
            strategy={}, trainer={**BARE_TRAINER, "max_steps": warmup + steps + 1, "limit_val_batches": 0}
        )
        fit.trainer.callbacks.append(costs)
        fit.trainer.fit(fit.model, fit.datamodule)
    return costs.found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="recipes/quickstart.yaml")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    world = Recipe(options.config).world_size()
    found = run_ranks(world, measured, options.config, 5, options.steps, timeout=600)[0]
    step = found["step"]
    rows = {
        "votes about stopping": (found["votes"], found["vote"]),
        "flight record": (found["collectives"], found["record"]),
        "token ids in range": (1.0, found["ids"]),
        "copies compared": (1 / PERIOD, found["compare"]),
    }
    print(f"{world} ranks, a step of {step / 1000:.1f} ms; microseconds a step on rank 0\n")
    print(f"{'':22}{'a step':>8}{'clock':>10}{'processor':>11}{'of the step':>13}")
    total = 0.0
    for name, (count, (clock, processor)) in rows.items():
        total += count * clock
        print(f"{name:22}{count:8.2f}{count * clock:10.1f}{count * processor:11.1f}{count * clock / step:12.3%}")
    print(f"{'all':22}{'':8}{total:10.1f}{'':11}{total / step:12.3%}")


if __name__ == "__main__":
    main()
