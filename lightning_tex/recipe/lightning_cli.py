"""LightningCLI with this package's defaults: its model, data, strategy, loggers and public class paths."""

from __future__ import annotations

import os
import re
import sys
from functools import partial, update_wrapper
from types import MethodType
from typing import Any

import torch
from jsonargparse import Namespace
from lightning import LightningDataModule, LightningModule
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, ReduceLROnPlateau, instantiate_class
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_utilities import module_available

from lightning_tex.callbacks import OneLineProgressBar
from lightning_tex.data import TextDataModule
from lightning_tex.models import LanguageModel
from lightning_tex.optim import optimized_parameters
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.recipe.instantiation import data_alone, own_words
from lightning_tex.recipe.option_parser import OptionParser
from lightning_tex.strategy import TexMoEStrategy
from lightning_tex.strategy.ckpt_path import AUTO


def public_path(cls: type) -> str:
    """The shortest import path of a class, which a saved configuration names: ``lightning_tex.LanguageModel``.

    Where a class is defined may change from version to version; what a package offers at its face does not.
    """
    packages = cls.__module__.split(".")
    for length in range(1, len(packages)):
        package = ".".join(packages[:length])
        if getattr(sys.modules[package], cls.__name__, None) is cls:
            return f"{package}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__name__}"


class TexCLI(LightningCLI):
    """LightningCLI with this package's defaults.

    The model is a :class:`LanguageModel` and the data a :class:`TextDataModule` unless ``class_path`` says otherwise;
    the model's vocabulary is the data's. ``--optimizer`` and ``--lr_scheduler`` are instantiated when the Trainer asks
    for them, over the parameters that exist then: the model may be built in ``configure_model`` and is sharded by
    then. The scheduler is stepped after every optimizer step (ReduceLROnPlateau: after every validation).
    """

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        # The list of all options belongs to --help: printed before every error it hides the error.
        usage = f"lightning-tex {subcommand} [--config RECIPE] [--OPTION VALUE ...]"
        return super()._prepare_subcommand_parser(klass, subcommand, usage=usage, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        _check_devices(self.config.get(str(self.config.get("subcommand")), self.config).trainer)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name, default in (("model", LanguageModel), ("data", TextDataModule)):
            parser.set_defaults({name: {"class_path": public_path(default)}})
        parser.add_argument(
            "--cluster",
            type=str | None,
            default=None,
            help="GPUs that the recipe is made for, as `lightning-tex plan --cluster` has them: those of a plan where "
            "no others are given; training does not depend on it",
        )
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="the run's folder: its logs, and checkpoints/ of every ModelCheckpoint without a dirpath. "
            "trainer.default_root_dir, where it is given, is the logs' instead",
        )

    def instantiate_classes(self) -> None:
        """Data first: the model's vocabulary, where it has one in its ``config``, is the data's."""
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        _name_publicly(config)
        sizes = config.get("model.init_args.config")
        if config.get("data") and isinstance(sizes, Namespace) and "vocab_size" in sizes:
            data = data_alone(config, self._datamodule_class)
            sizes.vocab_size = getattr(data, "vocab_size", sizes.vocab_size)
            self.parser.add_instantiator(lambda *_, **__: data, LightningDataModule, prepend=True)
        with own_words():
            super().instantiate_classes()

    def before_fit(self) -> None:
        """Refuse what only our strategy knows."""
        other = self.trainer.strategy
        if self._get(self.config, "ckpt_path") == AUTO and not isinstance(other, TexMoEStrategy):
            raise UserValueError(
                f"ckpt_path='auto' needs TexMoEStrategy, and the strategy is {type(other).__name__}; legal with it: "
                "ckpt_path='last' or a path"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        given = self._get(self.config_init, "trainer")
        run_dir = self._get(self.config_init, "run_dir")
        root = given.get("default_root_dir") or run_dir
        if root:
            kwargs.setdefault("default_root_dir", root)
        if run_dir:
            _save_below(run_dir, given.get("callbacks"))
        kwargs.setdefault("callbacks", _with_progress_bar(given))
        if given.get("logger") in (None, True):
            kwargs["logger"] = _default_loggers(root or ".")
        return super().instantiate_trainer(**kwargs)

    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        optimizer = self._get(self.config_init, "optimizer")
        if not optimizer:
            return
        scheduler = self._get(self.config_init, "lr_scheduler")
        configure = partial(_configure_optimizers, optimizer=optimizer, scheduler=scheduler)
        update_wrapper(configure, _configure_optimizers)  # Lightning tells by the name whether a hook is overridden
        self.model.configure_optimizers = MethodType(configure, self.model)


def cli_of(command: str) -> type[TexCLI]:
    """The one that knows this subcommand alone: to make parsers for the others takes a tenth of the time of a start."""
    method = {command: TexCLI.subcommands()[command]}
    return type(TexCLI.__name__, (TexCLI,), {"subcommands": staticmethod(lambda: method)})


def _name_publicly(config: Namespace) -> None:
    """Let the configuration, which is saved, name our model and data by their public paths, however they were given."""
    for part in ("model", "data"):
        module, _, name = str(config.get(f"{part}.class_path")).rpartition(".")
        if module.partition(".")[0] == __name__.partition(".")[0]:
            config[part].class_path = public_path(getattr(sys.modules[module], name))


def _check_devices(trainer: Namespace) -> None:
    """Refuse what is no number of devices, of which Lightning does not say what is legal.

    Raises:
        UserValueError: with what is.
    """
    without_gpu = trainer.accelerator == "auto" and not torch.cuda.is_available()
    on_cpu = trainer.accelerator == "cpu" or without_gpu
    gpus = r"|-1|\d+,(\d+,?)*|\[\d+(,\d+)*\]"
    if not re.fullmatch(r"auto|0*[1-9]\d*" + ("" if on_cpu else gpus), str(trainer.devices).replace(" ", "")):
        also = "" if on_cpu else "; -1 for all GPUs; GPUs by their numbers, such as 0,1"
        also += "; this host has no GPU" if without_gpu else ""
        raise UserValueError(
            f"--trainer.devices {trainer.devices}; legal: auto; a whole number of at least 1, such as 4{also}"
        )


def _configure_optimizers(module: LightningModule, optimizer: Any, scheduler: Any) -> Any:
    built = instantiate_class(optimized_parameters(module, optimizer), optimizer)
    if not scheduler:
        return built
    schedule = instantiate_class(built, scheduler)
    if isinstance(schedule, ReduceLROnPlateau):
        return LightningCLI.configure_optimizers(module, built, schedule)
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _save_below(run_dir: str, callbacks: Any) -> None:
    """Give callbacks that save checkpoints, and were told no folder, the run's."""
    if _is_local_file_protocol(run_dir):
        run_dir = os.path.realpath(os.path.expanduser(run_dir))
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = os.path.join(run_dir, "checkpoints")


def _with_progress_bar(trainer: Namespace) -> list[Any]:
    """The Trainer's callbacks, and ours where nothing is said of a progress bar."""
    given = trainer.get("callbacks")
    callbacks = [*given] if isinstance(given, list) else [] if given is None else [given]
    if trainer.get("enable_progress_bar") in (None, True) and not any(isinstance(c, ProgressBar) for c in callbacks):
        callbacks.append(OneLineProgressBar())
    return callbacks


def _default_loggers(root: str) -> list[Any]:
    csv = CSVLogger(root, name="logs")
    if not module_available("tensorboard") and not module_available("tensorboardX"):
        return [csv]
    return [csv, TensorBoardLogger(root, name="logs", version=csv.version)]


DEFAULTS: dict[str, Any] = {
    "model_class": LightningModule,
    "parser_class": OptionParser,
    "subclass_mode_model": True,
    "save_config_kwargs": {"overwrite": True},
    "trainer_defaults": {"strategy": TexMoEStrategy.strategy_name},
    "seed_everything_default": True,
}
