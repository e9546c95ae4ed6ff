"""A recipe, that is, configuration files and options, made into model, data and Trainer. A LightningCLI."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from difflib import get_close_matches
from functools import partial, update_wrapper
from types import MethodType
from typing import Any, NoReturn

import torch
from jsonargparse import Namespace
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, ReduceLROnPlateau, instantiate_class
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_utilities import module_available

from lightning_tex.data import TextDataModule
from lightning_tex.models import LanguageModel
from lightning_tex.parallel.errors import UserValueError
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


# Options of a fit that are read before the recipe is.
_OF_THE_COMMAND_LINE = ["restarts"]


class OptionParser(LightningArgumentParser):
    """Takes options by their whole names only, and tells of one that does not exist the nearest that does.

    A class's own options are read by a parser of this kind for itself, whose message comes to the outer one.
    """

    _REFUSED = re.compile(
        r"unrecognized arguments: --([^\s=]+)|Option '(.+)' is not accepted|Group '(.+)' does not accept option '(.+)'"
        r"|Subcommand '.+' does not accept option '(.+)'"
    )
    _UNKNOWN = re.compile(r"unknown option --(\S+?)(?:; nearest: --(\S+))?$", re.MULTILINE)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        key = re.search(r'Parser key "([\w.]+)"', message)
        prefix = f"{key[1]}." if key else ""
        if unknown := self._UNKNOWN.search(message):
            name, nearest = unknown.groups()
        elif refused := self._REFUSED.search(message):
            name = ".".join(filter(None, refused.groups()))
            parser = getattr(ex, "subcommand_parser", self)
            legal = [option.removeprefix("--") for option in parser._option_string_actions]
            legal += _OF_THE_COMMAND_LINE
            nearest = next(iter(get_close_matches(name, legal, 1)), None)
        else:
            super().error(message, ex)
        told = f"unknown option --{prefix}{name}" + (f"; nearest: --{prefix}{nearest}" if nearest else "")
        super().error(told, ex)


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

    def instantiate_classes(self) -> None:
        """Data first: the model's vocabulary, where it has one in its ``config``, is the data's."""
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        _name_publicly(config)
        sizes = config.get("model.init_args.config")
        if config.get("data") and isinstance(sizes, Namespace) and "vocab_size" in sizes:
            parser = LightningArgumentParser()
            parser.add_lightning_class_args(self._datamodule_class, "data", subclass_mode=True)
            data = parser.instantiate_classes(Namespace(data=config.data)).data
            sizes.vocab_size = getattr(data, "vocab_size", sizes.vocab_size)
            self.parser.add_instantiator(lambda *_, **__: data, LightningDataModule, prepend=True)
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


def _name_publicly(config: Namespace) -> None:
    """Let the configuration, which is saved, name our model and data by their public paths, however they were given."""
    for part in ("model", "data"):
        module, _, name = str(config.get(f"{part}.class_path")).rpartition(".")
        if module.partition(".")[0] == __package__:
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


DEFAULTS: dict[str, Any] = {
    "model_class": LightningModule,
    "parser_class": OptionParser,
    "subclass_mode_model": True,
    "save_config_kwargs": {"overwrite": True},
    "trainer_defaults": {"strategy": TexMoEStrategy.strategy_name},
    "seed_everything_default": True,
}


# The Trainer's arguments, of one that writes and prints nothing.
BARE_TRAINER: dict[str, Any] = {
    "logger": False,
    "callbacks": [],
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

# What a recipe may say that is for fit alone.
_OF_FIT = ("ckpt_path", "weights_only")


class _Parsed(TexCLI):
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        return super().init_parser(**kwargs, exit_on_error=False)

    def _set_seed(self) -> None:
        pass

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What a recipe may say to ``fit`` alone is read as well, and then left out."""
        super().add_arguments_to_parser(parser)
        for name in _OF_FIT:
            parser.add_argument(f"--{name}", default=None)

    def instantiate_classes(self) -> None:
        """Nothing: only the configuration is wanted."""


class Recipe:
    """A recipe that is instantiated several times, each time with other options.

    Args:
        path: the recipe's file.
        options: command-line words that take precedence over it, such as ``["--trainer.devices", "2"]``.

    Raises:
        ValueError: there is no such file, or an option or value that is not legal, in one line.
    """

    def __init__(self, path: str, options: Sequence[str] = ()) -> None:
        self.path = path
        try:
            config = _without_run(_Parsed, ["--config", path, *options]).config
        except ArgumentError as error:
            raise UserValueError(f"recipe {path}: {' '.join(str(error).split())}") from None
        for name in ("config", *_OF_FIT):
            config.pop(name, None)
        self._config = config

    @property
    def config(self) -> Namespace:
        """What the recipe says, options and defaults included; a copy."""
        return deepcopy(self._config)

    def strategy_options(self) -> dict[str, Any]:
        """The arguments that the recipe gives the strategy, but for the weights to begin with."""
        strategy = self._config.trainer.strategy
        given = strategy.get("init_args") if isinstance(strategy, (Namespace, dict)) else None
        options = dict(given.as_dict() if isinstance(given, Namespace) else given or {})
        options.pop("init_from", None)  # what is planned or measured does not depend on them
        return options

    def world_size(self) -> int:
        """Processes in all that the recipe asks for.

        Raises:
            ValueError: it leaves their number open.
        """
        nodes, devices = self._config.trainer.num_nodes, self._config.trainer.devices
        if isinstance(devices, str) and devices.isdigit():
            devices = int(devices)
        if isinstance(devices, list):
            devices = len(devices)
        if not isinstance(devices, int) or devices < 1:
            raise UserValueError(f"trainer.devices={devices!r} leaves the number of processes open; legal: a number")
        return int(nodes) * devices

    def accelerator(self) -> str:
        """The Trainer's, by name."""
        return str(self._config.trainer.accelerator)

    def instantiate(self, strategy: Mapping[str, Any], trainer: Mapping[str, Any]) -> TexCLI:
        """Model, data and Trainer, with a TexMoEStrategy.

        Args:
            strategy: arguments of the strategy that replace the recipe's.
            trainer: arguments of the Trainer that replace the recipe's.
        """
        config = deepcopy(self._config)
        for name, value in trainer.items():
            config.trainer[name] = value
        config.trainer.strategy = {
            "class_path": public_path(TexMoEStrategy),
            "init_args": {**self.strategy_options(), **strategy},
        }
        return _without_run(TexCLI, config)


def _without_run(cli: type[TexCLI], args: Any) -> TexCLI:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # beside a command line
        warnings.filterwarnings("ignore", message="No seed found")  # recipes need none
        # Nor does it write the configuration anywhere: what is measured is no run of the user's.
        return cli(**DEFAULTS, save_config_callback=None, args=args, run=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what Lightning says about every Trainer anew."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    loggers.append(logging.getLogger("lightning.pytorch.utilities.rank_zero"))
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            warnings.filterwarnings("ignore", message="The number of training batches")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
