"""``lightning-tex replay``: a step that was not finite, once more, and where in it the first infinity or NaN arises."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from lightning_tex.cli.options import Command
from lightning_tex.cli.tables import console
from lightning_tex.recipe import Recipe, quiet
from lightning_tex.strategy import TexMoEStrategy
from lightning_tex.strategy.nonfinite_steps import NonFiniteSteps
from lightning_tex.strategy.step_dump import Dump


@dataclass(frozen=True)
class ReplayOptions:
    """Which step.

    Args:
        dump: the folder that a run left, nonfinite-step=N.
        unpickle: batches and hyperparameters of other classes than tensors and plain containers, which can run any
            code: of your own dumps.
    """

    dump: Path
    unpickle: bool = False


def replay(options: ReplayOptions) -> dict[str, Any] | None:
    """Take a dumped step again, on the layout it was taken on, and name the first module, parameter or expert in which
    an infinity or NaN arises. Starts the ranks itself, or runs under torchrun or SLURM.
    """
    dump = Dump.read(options.dump, options.unpickle)
    with quiet():
        # The run's callbacks are not wanted here.
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
        warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no `val_dataloader`")
        module, trainer = _built(dump)
        found = None
        try:
            trainer.fit(module, dump.data(), ckpt_path=str(dump.state), weights_only=not dump.unpickles)
        except NonFiniteSteps as error:
            found = error.origin
    if not trainer.is_global_zero:
        return None
    step = f"step {dump.about['step']}"
    said = f"{step} is finite here" if found is None else f"{step}: infinite or NaN is first {found}"
    console().print(said, soft_wrap=True, highlight=False, markup=False)
    return {"dump": str(dump.path), "said": dump.about["said"], "found": found}


def _built(dump: Dump) -> tuple[LightningModule, Trainer]:
    about = dump.about
    flags: dict[str, Any] = {
        "accelerator": about["accelerator"],
        "devices": about["world"] // about["num_nodes"],
        "num_nodes": about["num_nodes"],
        "precision": about["precision"],
        "accumulate_grad_batches": about["accumulate_grad_batches"],
        "callbacks": [],
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_steps": about.get("steps_done", about["step"]) + 1,
        "max_epochs": -1,
        "max_time": None,
        "limit_train_batches": 1.0,
        "limit_val_batches": 0,
        "val_check_interval": 1.0,
        "num_sanity_val_steps": 0,
    }
    strategy = {**about["strategy"], "max_skipped_steps": 1, "check_memory": False}
    if dump.recipe is not None:
        made = Recipe(str(dump.recipe)).instantiate(strategy, flags)
        module, trainer = made.model, made.trainer
    else:
        module, trainer = dump.module(), Trainer(strategy=TexMoEStrategy(**strategy), **flags)
    trainer.callbacks.append(_AsItWas(dump))  # type: ignore[attr-defined]
    return module, trainer


class _AsItWas(Callback):
    """Watches the step, and gives it the random numbers that it had."""

    def __init__(self, dump: Dump) -> None:
        self._dump = dump

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The run's loader stood elsewhere; this one has only the step's batches."""
        checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = TexMoEStrategy.of(trainer)
        rank = strategy.topology.data.rank
        strategy.skipped_steps.replay(self._dump.indices(rank))
        strategy.draw_as(self._dump.random(rank))


COMMAND = Command("replay", replay, (ReplayOptions,), takes_path=True)


def main(words: Sequence[str]) -> None:
    """Run it; ends with exit code 1 where the step is finite now.

    Args:
        words: what follows ``replay`` on the command line.
    """
    report = COMMAND(words)
    if report is not None and report["found"] is None:
        raise SystemExit(1)
