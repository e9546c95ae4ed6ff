"""Where a checkpoint lies and which form it has, and a module from one of either form."""

from __future__ import annotations

import os
from functools import wraps
from typing import Any, TypeVar

import lightning.pytorch.core.saving as lightning_saving
from lightning import LightningModule
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO

from lightning_tex.saving import paths
from lightning_tex.saving.checkpoint_format import CheckpointFormat
from lightning_tex.saving.directory import DirectoryCheckpoint
from lightning_tex.saving.newest import find
from lightning_tex.saving.plain import PlainCheckpoint
from lightning_tex.saving.remote_path import at

_Module = TypeVar("_Module", bound=LightningModule)


def located(filepath: str, checkpoint_io: CheckpointIO) -> str:
    """The checkpoint that a name stands for, as :func:`find` has it; a plugin of the user's looks for itself.

    Raises:
        FileNotFoundError: there is none.
    """
    if type(checkpoint_io) is TorchCheckpointIO:
        return str(find(at(filepath)))
    return filepath


def reading_format(path: str | os.PathLike[str]) -> CheckpointFormat:
    """A directory is a :class:`DirectoryCheckpoint`, and refused if it has no manifest; all else is one plain file.

    The version is then inside: the manifest's ``format``, or :func:`lightning_tex.saving.plain_form.version_of`.
    """
    return DirectoryCheckpoint() if paths.is_directory(at(path)) else PlainCheckpoint()


_LIGHTNINGS_LOAD = lightning_saving.pl_load


def let_lightning_read_directories() -> None:
    """Let ``load_from_checkpoint`` of every LightningModule and LightningDataModule read directories, too."""

    @wraps(_LIGHTNINGS_LOAD)
    def load(path_or_url: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(path_or_url, (str, os.PathLike)) and paths.has_manifest(at(path_or_url)):
            trusted = options.get("weights_only") is False
            path_or_url = DirectoryCheckpoint().for_one_process(find(at(path_or_url)), trusted)
        return _LIGHTNINGS_LOAD(path_or_url, *arguments, **options)

    lightning_saving.pl_load = load


def load_from_checkpoint(module: type[_Module], path: str | os.PathLike[str], **arguments: Any) -> _Module:
    """``module.load_from_checkpoint(path, ..)`` for directories as well as files.

    Args:
        module: the LightningModule's class.
        path: of a checkpoint directory or a plain file, or its URL.
        arguments: as of Lightning's ``load_from_checkpoint``.

    Raises:
        FileNotFoundError: there is none.
        CorruptCheckpointError: a file of it is not what was written.
    """
    arguments.setdefault("weights_only", True)  # said explicitly, an environment variable cannot turn it off
    checkpoint = find(at(path))
    trusted = arguments["weights_only"] is False
    return module.load_from_checkpoint(reading_format(checkpoint).for_one_process(checkpoint, trusted), **arguments)
