"""A recipe that is instantiated several times, each time with other options, and never run by itself."""

from __future__ import annotations

import logging
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from jsonargparse import Namespace
from lightning import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser

from lightning_tex.parallel.errors import UserValueError
from lightning_tex.recipe.instantiation import data_alone
from lightning_tex.recipe.lightning_cli import DEFAULTS, TexCLI, public_path
from lightning_tex.strategy import TexMoEStrategy

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

    def datamodule(self) -> LightningDataModule | None:
        """The recipe's data alone, without its model; None: the model has its own."""
        if not self._config.get("data"):
            return None
        data: LightningDataModule = data_alone(self.config)
        return data

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
