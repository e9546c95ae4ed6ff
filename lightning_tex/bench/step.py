"""A recipe's training step by part: time, tokens per second and MFU."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from lightning_tex.bench.moments import LargeProduct, peak
from lightning_tex.bench.part_timeline import COMMUNICATION
from lightning_tex.bench.step_parts import BETWEEN, OPTIMIZER, REST, StepParts, Timed, part_of
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.precision import PRECISIONS
from lightning_tex.planner.model_flops import layer_flops
from lightning_tex.recipe import BARE_TRAINER, Recipe, quiet
from lightning_tex.strategy import TexMoEStrategy

_FOLLOWING = (REST, OPTIMIZER, COMMUNICATION, BETWEEN)  # after the parts that have products


def time_steps(recipe: Recipe, warmup: int, steps: int) -> dict[str, Any] | None:
    """Train a recipe for some steps and time them. Collective over its ranks.

    Args:
        recipe: the recipe.
        warmup: steps before.
        steps: steps that are timed as they are, and again by part.

    Returns:
        the report; ``None`` on all ranks but the first.

    Raises:
        ValueError: its data ended before, or its batches have no ``input_ids``.
    """
    watch = StepParts(warmup, steps)
    with quiet():
        fit = recipe.instantiate(
            strategy={},
            trainer={
                **BARE_TRAINER,
                "max_steps": watch.total_steps,
                "max_epochs": -1,
                "limit_train_batches": 1.0,
                "limit_val_batches": 0,
                "num_sanity_val_steps": 0,
            },
        )
        fit.trainer.callbacks.append(watch)  # type: ignore[attr-defined]
        fit.trainer.fit(fit.model, fit.datamodule)
    strategy = TexMoEStrategy.of(fit.trainer)
    if watch.timed is None:
        raise UserValueError(
            f"the recipe's data ended before {watch.total_steps} optimizer steps; legal: smaller --warmup and --steps"
        )
    if not strategy.is_global_zero:
        return None
    precision = str(strategy.precision_plugin.precision)
    device = strategy.root_device
    product = LargeProduct(device, PRECISIONS[precision].usual)
    return {
        "recipe": recipe.path,
        "layout": str(strategy.topology.layout),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": precision,
        "activation_checkpointing": strategy.options.activation_checkpointing,
        "optimizer_state_format": recipe.strategy_options().get("optimizer_state_format", "fp32"),
        "parameters": sum(parameter.numel for parameter in strategy.training_flops.model.parameters),
        "steps": steps,
        **_report(watch.timed, strategy, peak(device, precision, product)),
    }


def _report(timed: Timed, strategy: TexMoEStrategy, of: dict[str, Any]) -> dict[str, Any]:
    world, model = strategy.world_size, strategy.training_flops.model
    flops: dict[str, float] = defaultdict(float)
    for placed, count in model.layer_counts.items():
        flops[part_of(placed.layer)] += timed.tokens * count * layer_flops(placed.layer, timed.length) / world
    seconds = timed.median_parts
    names = [name for name in dict.fromkeys(part.name for part in seconds) if name not in _FOLLOWING]
    rows = {}
    for name in (*names, *_FOLLOWING):
        during = {part.during: time for part, time in seconds.items() if part.name == name}
        if not during:
            continue
        total = sum(during.values())
        rate = flops[name] / total if flops.get(name) and total else None
        rows[name] = {
            "ms": {key: 1e3 * time for key, time in during.items()},
            "total_ms": 1e3 * total,
            "flops": flops.get(name, 0.0),
            "flops_per_second": rate,
            "mfu": None if rate is None else rate / of["flops_per_second"],
        }
    whole = sum(flops.values())
    return {
        "tokens": timed.tokens,
        "sequence_length": timed.length,
        "step_ms": 1e3 * timed.step_seconds,
        "step_ms_all": [1e3 * time for time in timed.seconds],
        "step_ms_by_part": 1e3 * sum(seconds.values()),
        "tokens_per_second": timed.tokens / timed.step_seconds,
        "tokens_per_second_of_a_device": timed.tokens / timed.step_seconds / world,
        "flops_per_second": whole / timed.step_seconds,
        "mfu": whole / timed.step_seconds / of["flops_per_second"],
        "peak": of,
        "peak_bytes": timed.peak_bytes,
        "unknown_layers": list(strategy.training_flops.unknown),
        "parts": rows,
    }
