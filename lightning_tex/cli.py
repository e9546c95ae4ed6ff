"""Floor 7: the command line, ``lightning-tex`` = ``python -m lightning_tex``. A LightningCLI."""

from __future__ import annotations

import sys
import traceback
import warnings
from functools import partial, update_wrapper
from types import MethodType
from typing import Any

from lightning import LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, ReduceLROnPlateau, instantiate_class
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning_utilities import module_available

import lightning_tex  # registers the strategy
from lightning_tex.data import TextDataModule
from lightning_tex.language_model import LanguageModel


class TexCLI(LightningCLI):
    """LightningCLI with this package's defaults.

    The model is a :class:`LanguageModel` and the data a :class:`TextDataModule` unless ``class_path`` says otherwise;
    the model's vocabulary is the data's. ``--optimizer`` and ``--lr_scheduler`` are instantiated when the Trainer asks
    for them, over the parameters that exist then: the model may be built in ``configure_model``, and is cut by then.
    The scheduler is stepped after every optimizer step (ReduceLROnPlateau: after every validation).
    """

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        # The list of all options belongs to --help: printed before every error it hides the error.
        usage = f"lightning-tex {subcommand} [--config RECIPE] [--OPTION VALUE ...]"
        return super()._prepare_subcommand_parser(klass, subcommand, usage=usage, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.vocab_size", "model.init_args.config.vocab_size", apply_on="instantiate")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        given = self._get(self.config_init, "trainer")
        if given.get("logger") in (None, True):
            kwargs["logger"] = _default_loggers(given.get("default_root_dir") or ".")
        return super().instantiate_trainer(**kwargs)

    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        optimizer = self._get(self.config_init, "optimizer")
        if not optimizer:
            return
        scheduler = self._get(self.config_init, "lr_scheduler")
        configure = partial(_configure_optimizers, optimizer=optimizer, scheduler=scheduler)
        update_wrapper(configure, _configure_optimizers)  # Lightning tells by the name whether a hook is overridden
        self.model.configure_optimizers = MethodType(configure, self.model)


def _configure_optimizers(module: LightningModule, optimizer: Any, scheduler: Any) -> Any:
    built = instantiate_class(module.parameters(), optimizer)
    if not scheduler:
        return built
    schedule = instantiate_class(built, scheduler)
    if isinstance(schedule, ReduceLROnPlateau):
        return LightningCLI.configure_optimizers(module, built, schedule)
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _default_loggers(root: str) -> list[Any]:
    csv = CSVLogger(root, name="logs")
    if not module_available("tensorboard") and not module_available("tensorboardX"):
        return [csv]
    return [csv, TensorBoardLogger(root, name="logs", version=csv.version)]


def main(args: ArgsType = None) -> None:
    """Run ``lightning-tex fit|validate|test|predict``.

    What the user can put right (a wrong option, layout or file) ends in one line per failing rank and exit code 2, as
    the parser's own errors do; everything else keeps its traceback. A rank that another one left says only that.

    Args:
        args: command-line words; ``None``: the process's own.
    """
    # Lightning 2.6's own call, deprecated by torch 2.13; nothing a user could act on.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    try:
        TexCLI(
            LanguageModel,
            TextDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"strategy": lightning_tex.TexMoEStrategy.strategy_name},
            seed_everything_default=True,
            args=args,
        )
    except (ValueError, TypeError, RuntimeError, OSError, MisconfigurationException) as error:
        # Every rank tells: the fault may be one rank's own, or rank 0 already ended by its launcher.
        rank = getattr(rank_zero_only, "rank", 0)
        if _left_by_another_rank(error):
            print(
                f"[rank {rank}] ended: another rank has closed its connection; see that rank's error", file=sys.stderr
            )
            raise SystemExit(1) from None
        if not _raised_on_purpose(error):
            raise
        print(f"[rank {rank}] error: {error}" if rank else f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def _left_by_another_rank(error: Exception) -> bool:
    """Whether gloo or torch's store says so. NCCL does not notice: its launcher or its watchdog ends the process."""
    text = str(error)
    return isinstance(error, RuntimeError) and ("losed by peer" in text or "reset by peer" in text)


def _raised_on_purpose(error: Exception) -> bool:
    """Whether a ``raise`` statement of this package or one it drives says what is wrong: no code went astray."""
    frame, _ = list(traceback.walk_tb(error.__traceback__))[-1]
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return package in ("lightning_tex", "lightning", "datasets") and line.startswith("raise ")
