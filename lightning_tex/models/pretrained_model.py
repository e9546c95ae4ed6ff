"""A published model as ours: its folder, its family, the decoder's configuration, and weights that fill it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_tex.data import TokenDataModule
from lightning_tex.data.tokenizer import vocabulary
from lightning_tex.models.config import DecoderConfig
from lightning_tex.models.decoder import Decoder
from lightning_tex.models.families import FAMILIES, family_of
from lightning_tex.models.families.family import Family
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.initialization import materialise
from lightning_tex.parallel.sharding import parameter_shardings
from lightning_tex.parallel.topology import Topology
from lightning_tex.pretrained.folder import CONFIG, PretrainedFolder, read_json
from lightning_tex.pretrained.hub import local_folder
from lightning_tex.pretrained.reading import PretrainedWeights
from lightning_tex.pretrained.rules import Bindings, Shapes, chosen
from lightning_tex.saving.model_state import load_model

# What a checkpoint calls the entry below.
ORIGIN = "pretrained"
# Of a decoder's names in a LanguageModel.
PREFIX = "decoder."


@dataclass(frozen=True)
class Origin:
    """What a model that began from a published one is known by, and what its export goes by.

    Args:
        name: the folder or repository.
        revision: of a repository.
        folder: where it lay here.
        config: its ``config.json``.
    """

    name: str
    revision: str | None
    folder: str
    config: dict[str, Any]

    @property
    def is_repository(self) -> bool:
        """Whether its name is one of the hub, and not of a folder."""
        return not self.name.startswith("~") and Path(self.folder).parts[-2:] != Path(self.name).parts[-2:]

    @property
    def family(self) -> Family:
        """Which rules its names follow."""
        return FAMILIES[self.config["model_type"]]


class PretrainedModel:
    """A folder of pretrained weights with the configuration and the rules of its family.

    Args:
        name: a folder, or a repository of the Hugging Face hub.
        revision: of a repository.
        overrides: arguments of :class:`DecoderConfig` that take precedence over those of the folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a family that is not known, or a configuration that is not expressed.
    """

    def __init__(self, name: str, revision: str | None = None, overrides: Mapping[str, Any] | None = None) -> None:
        self.folder = PretrainedFolder(local_folder(name, revision))
        self.family = family_of(self.folder.config, str(self.folder.path / CONFIG))
        self.config = self.family.config(self.folder.config, overrides)
        self.origin = Origin(str(name), revision, str(self.folder.path.absolute()), self.folder.config)

    @cached_property
    def weights(self) -> PretrainedWeights:
        """What fills a :class:`LanguageModel`.

        Raises:
            ValueError: the files are damaged, or do not fit the configuration: all that is wrong, by name.
        """
        return family_weights(self.family, self.config, self.folder)


def family_weights(family: Family, config: DecoderConfig, folder: PretrainedFolder) -> PretrainedWeights:
    """What fills a :class:`LanguageModel` of this configuration; errors as of :attr:`PretrainedModel.weights`."""
    bindings, shapes = bind(family, config, folder)
    left_out = family.left_out(folder.tensors, config)
    if left_out:
        rank_zero_warn(f"{len(left_out)} tensors of {folder.path} are left out, such as {left_out[0]}")
    ignored = {*left_out, *(name for name in folder.tensors if name.endswith(family.ignored))}
    return PretrainedWeights(folder, bindings, shapes, PREFIX, ignored)


def read_config(
    name: str, revision: str | None = None, overrides: Mapping[str, Any] | None = None, copies: Path | None = None
) -> DecoderConfig:
    """The configuration of a published model, of which nothing but ``config.json`` is read.

    Args:
        name, revision, overrides: as of :class:`PretrainedModel`.
        copies: a folder of copies of published configurations, called like the last part of a model's name,
            ``OLMoE-1B-7B-0924.json``. One is read where there is no such model's folder here; the hub is not asked.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a family that is not known, or a configuration that is not expressed.
    """
    copy = None if copies is None else copies / f"{Path(name).name}.json"
    if copy is not None and copy.is_file() and not Path(name).expanduser().is_dir():
        file, theirs = copy, read_json(copy)
    else:
        folder = PretrainedFolder(local_folder(name, revision, config_only=True))
        file, theirs = folder.path / CONFIG, folder.config
    return family_of(theirs, str(file)).config(theirs, overrides)


def bind(family: Family, config: DecoderConfig, folder: PretrainedFolder | None = None) -> tuple[Bindings, Shapes]:
    """The family's rules for a decoder, and the whole shapes of its parameters and buffers.

    Args:
        folder: whose layout of names is taken; ``None``: that which is written.
    """
    with torch.device("meta"):
        decoder = Decoder(config)
    shapes = {name: sharding.box.full for name, sharding in parameter_shardings(decoder, Topology.single()).items()}
    saved = decoder.state_dict().keys()
    shapes |= {name: tuple(buffer.shape) for name, buffer in decoder.named_buffers() if name in saved}
    names = None if folder is None else folder.tensors.keys()
    return Bindings.of(chosen(family.rules(config), names), shapes), shapes


def folder_of(origin: Origin | None) -> Path | None:
    """The folder that a model began from, if it is still there."""
    if origin is None:
        return None
    return folder if (folder := Path(origin.folder)).is_dir() else None


def fill_whole(module: LightningModule) -> None:
    """Give a module in one process its weights: those it is to begin with, all others drawn."""
    weights: PretrainedWeights | None = module.initial_weights()  # type: ignore[operator]
    names = [] if weights is None else [name for _, name in weights.saved]
    materialise(module, module.device, torch.initial_seed(), given=names)
    if weights is not None:
        load_model(module, Topology.single(), weights, strict=False)


def require_own_tokens(module: LightningModule) -> None:
    """Refuse data whose tokens mean nothing to a model, before they are prepared.

    Raises:
        ValueError: more tokens than the model's vocabulary has, or another tokenizer than that of the published model
            it begins with.
    """
    trainer: Any = module._trainer
    data = None if trainer is None else trainer.datamodule
    own = folder_of(module.origin)  # type: ignore[arg-type]
    file = None if own is None else own / "tokenizer.json"
    size, most = getattr(data, "vocab_size", None), module.config.vocab_size  # type: ignore[union-attr]
    if isinstance(size, int) and size > most:  # type: ignore[operator]
        fitting = f"data.tokenizer={str(own)!r}" if file and file.is_file() else f"a vocabulary of {most} at most"
        raise UserValueError(f"the data's tokenizer has {size} tokens, and the model {most}; legal: {fitting}")
    if file is None or not file.is_file() or not isinstance(data, TokenDataModule):
        return
    if (theirs := data.vocabulary()) is None:
        raise UserValueError(
            f"the data trains a tokenizer of its own (tokenizer=None), and the model has that of {own}; legal: "
            f"data.tokenizer={str(own)!r}"
        )
    ours = vocabulary(file)
    differing = sorted(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token))
    if differing:
        token = differing[0]
        raise UserValueError(
            f"the data's tokenizer is not that of {own}: {len(differing)} tokens differ, such as {token!r}, "
            f"{theirs.get(token)} in the data's and {ours.get(token)} in the model's; legal: data.tokenizer="
            f"{str(own)!r}"
        )
