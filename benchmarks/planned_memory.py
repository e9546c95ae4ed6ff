"""Planned against allocated peak memory of a training step, on GPUs.

Runs a recipe for three optimizer steps on its ranks and compares what the allocator's statistics say of the last one
with the plan; without a CUDA device it says so and ends:

    python benchmarks/planned_memory.py --config recipe.yaml [--trainer.devices 8 ...]
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from lightning_tex.cli.plan_recipe import own_candidate, read_recipe
from lightning_tex.planner.layouts import Job
from lightning_tex.planner.memory import memory, size
from lightning_tex.recipe import Recipe, quiet

STEPS = 3


class Peak(Callback):
    """The most that the allocator had given out during the last step."""

    def __init__(self) -> None:
        self.bytes, self._begun = 0, False

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == STEPS - 1 and not self._begun:
            torch.cuda.reset_peak_memory_stats()
            self._begun = True

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == STEPS:
            self.bytes = torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the recipe; further options are its own")
    options, more = parser.parse_known_args()
    if not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device")
        return
    planned_recipe = read_recipe(options.config, more)
    numbers = planned_recipe.numbers
    world, length, batch = (numbers[name] for name in ("gpus", "sequence_length", "global_batch_size"))
    job = Job(planned_recipe.model, world, length, batch, numbers["precision"], optimizer=numbers["optimizer"])
    candidate = own_candidate(job, planned_recipe.strategy)
    if candidate is None:
        sys.exit(f"{options.config} cannot run on {world} ranks as it is")
    planned, peak = memory(job, candidate), Peak()
    trainer = {"max_steps": STEPS, "limit_val_batches": 0, "logger": False, "enable_checkpointing": False}
    with quiet():
        fit = Recipe(options.config, more).instantiate({}, {**trainer, "accelerator": "gpu", "callbacks": []})
        fit.trainer.callbacks.append(peak)  # type: ignore[attr-defined]
        fit.trainer.fit(fit.model, fit.datamodule)
    if fit.trainer.is_global_zero:
        print(f"planned {size(planned.peak)}, allocated {size(peak.bytes)}: {planned.peak / peak.bytes:.3f}")
        print(json.dumps({"planned": planned.peak, "allocated": peak.bytes, "parts": planned.parts()}))


if __name__ == "__main__":
    main()
