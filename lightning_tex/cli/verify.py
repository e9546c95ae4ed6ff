"""``lightning-tex verify``: a recipe's module trains on every layout as in one process, or what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from inspect import signature
from typing import Any

from jsonargparse.typing import PositiveFloat

from lightning_tex.cli.options import Command, Count
from lightning_tex.cli.plan_recipe import read_recipe
from lightning_tex.cli.tables import console, table
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.recipe import BARE_TRAINER, Recipe, quiet
from lightning_tex.strategy import TexMoEStrategy
from lightning_tex.testing import Verdict, compare_layouts
from lightning_tex.testing.runs import sgd
from lightning_tex.testing.verdict import Status, complaint

# Options of the recipe's strategy that every layout is given; the others say the layout, or are for larger machines.
_KEPT = (
    "sequence_parallel",
    "zero_stage",
    "tile_size",
    "duplicate_token_dropping",
    "expert_chunks",
    "activation_checkpointing",
    "activation_checkpointing_policy",
)
_STEPS = Count(3)
_KINDS = ("loss", "gradients", "gradient norm", "parameters")
# What is wrong stands out.
_ENDINGS: dict[Status, str] = {
    "alike": "alike",
    "differs": "DIFFERS",
    "failed": "FAILED",
    "not tried": "not tried",
}


@dataclass(frozen=True)
class VerifyOptions:
    """What is compared.

    Args:
        config: the recipe.
        devices: numbers of processes; every legal layout of each is tried.
        steps: optimizer steps.
        precision: the Trainer's; in 64-true rounding cannot be mistaken for an error.
        tolerance: relative 2-norm per tensor; left out: by precision, see lightning_tex.testing.TOLERANCES.
        own_optimizer: the recipe's optimizer, in place of SGD, which hides no wrong scale.
    """

    config: str
    devices: list[Count] = field(default_factory=lambda: [Count(1), Count(2), Count(4)])
    steps: Count = _STEPS
    precision: str = "64-true"
    tolerance: PositiveFloat | None = None
    own_optimizer: bool = False


def verify(options: VerifyOptions, more: list[str]) -> dict[str, Any]:
    """Train a recipe's module on every legal layout of a few processes, on CPU, and in one process, on the same
    batches, and compare losses, gradient norm, gradients and parameters. Further options are the recipe's own, such as
    --model.init_args.config.num_layers 2.
    """
    parameters = sum(read_recipe(options.config, more).model.counts().values())
    _require_memory(parameters, max(options.devices), options.steps)
    recipe = Recipe(options.config, more)
    with quiet():
        made = recipe.instantiate(_ONE_RANK, _ALONE)
    module, data = made.model, made.datamodule
    out = console()
    out.print(f"{options.config}: every legal layout of {', '.join(map(str, options.devices))} processes")
    verdicts = compare_layouts(
        lambda: (module, data),
        devices=options.devices,
        strategy=_kept_options(recipe.strategy_options()),
        steps=options.steps,
        precision=options.precision,
        tolerance=options.tolerance,
        optimizer=None if options.own_optimizer else sgd,
        timeout=600,
        progress=lambda verdict: out.print(f"  {_ENDINGS[verdict.status]}  {verdict.run}"),
    )
    show(verdicts)
    alike = complaint(verdicts, named=False) is None
    return {"recipe": options.config, "alike": alike, "layouts": [_plain(v) for v in verdicts]}


COMMAND = Command("verify", verify, (VerifyOptions,), takes_recipe=True)


def main(words: Sequence[str]) -> None:
    """Run it; ends with exit code 1 where a layout differs or fails, or none could be tried.

    Args:
        words: what follows ``verify`` on the command line.
    """
    report = COMMAND(words)
    if report is not None and not report["alike"]:
        raise SystemExit(1)


def show(verdicts: Sequence[Verdict]) -> None:
    """Print the verdicts as a table, and what is wrong with those that differ."""
    out = console()
    rows = table("ranks", "tensor", "expert", "expert_tensor", "data", *_KINDS, "", title="largest relative difference")
    for verdict in verdicts:
        layout = verdict.layout
        sizes = [layout.tensor, layout.expert, layout.expert_tensor, layout.data] if layout else ["-"] * 4
        figures = (f"{verdict.worst[kind]:.1e}" if kind in verdict.worst else "-" for kind in _KINDS)
        rows.add_row(str(verdict.run.devices), *map(str, sizes), *figures, _ENDINGS[verdict.status])
    out.print(rows)
    for verdict in verdicts:
        if not verdict.alike:
            out.print(str(verdict), soft_wrap=True)
    alike = sum(verdict.alike for verdict in verdicts)
    out.print(f"{alike} of {len(verdicts)} layouts train as one process does")


def _kept_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of the strategy's arguments those that are kept and are not the defaults."""
    defaults = signature(TexMoEStrategy).parameters
    return {name: given[name] for name in _KEPT if name in given and given[name] != defaults[name].default}


def _plain(verdict: Verdict) -> dict[str, Any]:
    return {
        "devices": verdict.run.devices,
        "strategy": dict(verdict.run.strategy),
        "layout": None if verdict.layout is None else asdict(verdict.layout),
        "status": verdict.status,
        "alike": verdict.alike,
        "worst": {kind.replace(" ", "_"): value for kind, value in verdict.worst.items()},
        "first_difference": None if verdict.first is None else str(verdict.first),
        "error": verdict.error,
        "reason": verdict.reason,
        "skipped": verdict.skipped,
    }


_ONE_RANK: dict[str, Any] = {
    "tensor_parallel_size": 1,
    "expert_parallel_size": "auto",
    "expert_tensor_parallel_size": None,
    "optimizer_state_format": "fp32",
}
# A Trainer that is made and not run: only the model and the data are wanted.
_ALONE: dict[str, Any] = {
    **BARE_TRAINER,
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "precision": "32-true",
    "plugins": None,
}


def _require_memory(parameters: int, devices: int, steps: int) -> None:
    """Refuse a model whose copies do not fit this machine's memory.

    Raises:
        UserValueError: with what it would take.
    """
    needed = 8 * parameters * (devices * 4 + steps * 2)  # in fp64: weights, gradients and their sums; and the records
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserValueError(
            f"comparing {parameters:,} parameters on {devices} processes takes about {needed / 2**30:.0f} GiB, and "
            f"this machine has {there / 2**30:.0f}; legal: a smaller model, such as --model.init_args.config.dim 64 "
            "--model.init_args.config.num_layers 2, or fewer --devices"
        )
