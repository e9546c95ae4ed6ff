"""What ``strategy="tex_moe"`` costs on one process, beside ``strategy="auto"``: the same module, batches and optimizer.

    python benchmarks/strategy_overhead.py [--config recipes/quickstart.yaml] [--steps 20] [--turns 9]

Each turn forks a process for the one and then for the other, which trains a few steps and counts processor time of all
threads. Printed are medians, and the median over turns of the ratio: below 1, a step with the strategy costs less.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from itertools import pairwise
from typing import Any

import lightning as L
import torch

from lightning_tex.recipe import BARE_TRAINER, Recipe, quiet
from lightning_tex.testing import run_ranks

WARM_UP = 5
STRATEGIES = ("auto", "tex_moe")


class Clocks(L.Callback):
    """Processor time and time on the clock at the end of every step."""

    def __init__(self) -> None:
        self.processor: list[float] = []
        self.clock: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.processor.append(time.process_time())
        self.clock.append(time.perf_counter())


def step_times(config: str, strategy: str, steps: int, threads: int) -> tuple[float, float, float]:
    """Median milliseconds of a step on the processor and on the clock, and the last loss."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")  # Lightning's own use
    clocks = Clocks()
    with quiet():
        one = {"tensor_parallel_size": 1, "expert_parallel_size": 1}
        parts = Recipe(config).instantiate(strategy=one, trainer={**BARE_TRAINER, "devices": 1})
        given = parts.config.trainer
        trainer = L.Trainer(
            **{**BARE_TRAINER, "callbacks": [clocks]},
            strategy=strategy,
            accelerator="cpu",
            devices=1,
            precision=given.precision,
            gradient_clip_val=given.gradient_clip_val,
            max_steps=WARM_UP + steps,
            limit_val_batches=0,
        )
        trainer.fit(parts.model, parts.datamodule)
    loss = float(trainer.callback_metrics["train_loss"])
    return *(_median_step(times) for times in (clocks.processor, clocks.clock)), loss


def _median_step(times: list[float]) -> float:
    late = times[WARM_UP - 1 :]
    return statistics.median(after - before for before, after in pairwise(late)) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="recipes/quickstart.yaml")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in STRATEGIES}
    for turn in range(options.turns):
        for name in STRATEGIES if turn % 2 == 0 else STRATEGIES[::-1]:
            found[name] += run_ranks(1, step_times, options.config, name, options.steps, options.threads, timeout=600)
    print(f"{options.turns} turns of {options.steps} steps, {options.threads} thread(s); ms a step\n")
    print(f"{'':10}{'processor':>11}{'clock':>9}{'last loss':>11}")
    for name, rows in found.items():
        processor, clock, loss = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{name:10}{processor:11.2f}{clock:9.2f}{loss:11.4f}")
    for column, what in enumerate(("processor", "clock")):
        ratios = sorted(t[column] / a[column] for a, t in zip(found["auto"], found["tex_moe"], strict=True))
        print(f"tex_moe / auto, {what}: {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")


if __name__ == "__main__":
    main()
