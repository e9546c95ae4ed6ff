"""A recipe as the planner sees it: sizes, numbers of the job, and what it tells the strategy. Nothing is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lightning_tex.errors import UserValueError
from lightning_tex.models import DecoderConfig
from lightning_tex.parallel.topology import Communication, Layout
from lightning_tex.planner.layouts import Candidate, Job


def recipe_sizes(path: str, more: Sequence[str] = ()) -> tuple[DecoderConfig, dict[str, Any], dict[str, Any]]:
    """The decoder's sizes, the job's numbers as far as they are known, and the strategy's arguments.

    Args:
        path: the recipe.
        more: further words of the command line.

    Raises:
        ValueError: there is no such file, or its model's sizes cannot be read.
    """
    if not Path(path).is_file():
        raise UserValueError(f"--config {path}: there is no such file")
    from lightning_tex.recipe import Recipe  # takes seconds to import, which sizes do not need

    recipe = Recipe(path, list(more))
    config = recipe.config
    sizes = config.get("model.init_args.config")
    known = {field.name for field in fields(DecoderConfig)}
    sizes = sizes.as_dict() if isinstance(sizes, Namespace) else sizes
    if not isinstance(sizes, dict) or not set(sizes) <= known:
        raise UserValueError(
            f"recipe {path}: its model has no DecoderConfig as `config`, and its sizes cannot be read; legal: a "
            "lightning_tex.LanguageModel, or the sizes as options, without --config"
        )
    data, trainer = config.get("data.init_args") or {}, config.trainer
    if (vocabulary := data.get("vocab_size")) is not None:  # the model's is the data's
        sizes["vocab_size"] = vocabulary
    accumulation = int(trainer.get("accumulate_grad_batches") or 1)
    numbers: dict[str, Any] = {
        "sequence_length": data.get("sequence_length") or sizes.get("max_sequence_length"),
        "precision": str(trainer.get("precision") or "32-true"),
        "two_groups": not config.get("optimizer"),
    }
    if data.get("global_batch_size"):  # of a micro-step over all ranks
        numbers["global_batch_size"] = data["global_batch_size"] * accumulation
    devices = str(trainer.get("devices"))
    if devices.isdigit():
        numbers["gpus"] = int(devices) * int(trainer.get("num_nodes") or 1)
    return DecoderConfig(**sizes), numbers, {**recipe.strategy_options(), "accumulate_grad_batches": accumulation}


def own_candidate(job: Job, own: dict[str, Any]) -> Candidate | None:
    """What a recipe itself says; ``None`` where it would not run so on these ranks, or there is none.

    Args:
        job: the recipe's.
        own: the strategy's arguments, and ``accumulate_grad_batches``.
    """
    accumulation = own.get("accumulate_grad_batches")
    if accumulation is None:
        return None
    sizes = "tensor_parallel_size", "expert_parallel_size", "expert_tensor_parallel_size", "duplicate_token_dropping"
    given = {name: own[name] for name in sizes if name in own}
    try:
        layout = Layout.resolve(job.world, **given, num_experts=job.sizes.experts)
        job.sizes.check(layout)
    except ValueError:
        return None
    micro_batch = job.global_batch_size // (accumulation * layout.data)
    if micro_batch * accumulation * layout.data != job.global_batch_size:
        return None
    how = Communication(
        own.get("duplicate_token_dropping", True), sequence_parallel=own.get("sequence_parallel", False)
    )
    return Candidate(
        layout, micro_batch, accumulation, own.get("zero_stage", 1), own.get("activation_checkpointing"),
        own.get("optimizer_state_format", "fp32"), how,
    )  # fmt: skip
