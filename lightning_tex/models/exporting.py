"""A model as a folder that transformers loads: from a module on the ranks that hold it, or from any checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_tex.data import TokenDataModule
from lightning_tex.lora.merging import merged_state
from lightning_tex.models.adapter_checkpoints import LORA, merged_weights
from lightning_tex.models.config import DecoderConfig
from lightning_tex.models.families import family_that_expresses
from lightning_tex.models.families.family import Family
from lightning_tex.models.pretrained_model import ORIGIN, PREFIX, Origin, bind, folder_of
from lightning_tex.optim.formats import MASTER
from lightning_tex.parallel.errors import UserTypeError, UserValueError
from lightning_tex.parallel.extent import Extent
from lightning_tex.parallel.topology import Axis, Topology
from lightning_tex.pretrained.card import model_card
from lightning_tex.pretrained.folder import CONFIG, GENERATION_CONFIG, TOKENIZER_FILES
from lightning_tex.pretrained.quantised import CONFIG_KEY as QUANTISED
from lightning_tex.pretrained.tensor_file import slabs
from lightning_tex.pretrained.writing import Weights, as_json, write_folder
from lightning_tex.saving import Location, at, find, paths
from lightning_tex.saving.global_tensor import GlobalTensor, Part
from lightning_tex.saving.model_state import MODEL, OPTIMIZER, Source, TensorPath
from lightning_tex.saving.plain_form import version_of
from lightning_tex.saving.reading import Directory
from lightning_tex.saving.trainer_state import load_file
from lightning_tex.saving.whole_tensors import WholeTensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_SIZE = "5GB"
Save = Callable[[Path, Topology, Any], None]
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Exported:
    """How a model is written.

    Args:
        config: of its decoder.
        origin: the published model it began from, if any.
        dtype: of the weights in files: a name, or ``None``.
        max_shard_size: of one file, such as ``"5GB"``.
        tokenizer: a folder or file whose tokenizer goes along; ``None``: that of the origin, if it is still there.
        data: the data module whose tokenizer goes along where there is no other.
    """

    config: DecoderConfig
    origin: Origin | None
    dtype: str | None = None
    max_shard_size: str | int = SHARD_SIZE
    tokenizer: str | os.PathLike[str] | None = None
    data: Any = None

    @property
    def family(self) -> Family:
        """That of the origin, or the first one that has such a decoder."""
        return family_that_expresses(self.config) if self.origin is None else self.origin.family

    def torch_dtype(self, held: torch.dtype) -> torch.dtype:
        """Of the weights in files: as asked, or as the origin has it, or as the model holds them.

        What the origin has quantised is written in 16 bits.
        """
        known = {} if self.origin is None else self.origin.config
        name = self.dtype or known.get("dtype") or known.get("torch_dtype")
        if name is None and QUANTISED in known:
            name = "bfloat16"
        if name is None:
            return held
        if name not in DTYPES:
            raise UserValueError(f"dtype={name!r}; legal: {', '.join(DTYPES)}")
        return DTYPES[name]

    def files(self, title: str, dtype: torch.dtype, parameters: int) -> dict[str, bytes]:
        """All files but those of weights."""
        config = self._their_config(dtype)
        tokenizer = self._tokenizer_files()
        c = self.config
        facts = {"parameters": f"{parameters:,}", "positions": f"{c.max_sequence_length:,}"}
        if c.num_experts > 1:
            facts["experts"] = f"{c.num_experts}, of which a token uses {c.top_k}"
        origin = self.origin
        began, repository = (None, False) if origin is None else (origin.name, origin.is_repository)
        return {
            CONFIG: as_json(config),
            GENERATION_CONFIG: self._generation_config(config),
            "README.md": model_card(title, self.family.architecture, began, repository, facts),
            **tokenizer,
        }

    def _their_config(self, dtype: torch.dtype) -> dict[str, Any]:
        name = str(dtype).removeprefix("torch.")
        if self.origin is None:
            ends = {"bos_token_id": None, "eos_token_id": getattr(self.data, "end_of_document_id", None)}
            return {**ends, **self.family.described(self.config), "dtype": name}
        known = {key: value for key, value in self.origin.config.items() if key not in ("torch_dtype", QUANTISED)}
        if not self.family.differences(known, self.config):  # all else stays as it was published
            return {**known, "dtype": name}
        kept = {key: value for key, value in known.items() if key not in self.family.said_anew()}
        return {**kept, **self.family.described(self.config), "dtype": name}

    def _generation_config(self, config: Mapping[str, Any]) -> bytes:
        folder = folder_of(self.origin)
        if folder is not None and (folder / GENERATION_CONFIG).is_file():
            return (folder / GENERATION_CONFIG).read_bytes()
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        return as_json({"_from_model_config": True, **{name: config[name] for name in names if name in config}})

    def _tokenizer_files(self) -> dict[str, bytes]:
        place = self.tokenizer or folder_of(self.origin)
        path = None if place is None else Path(place).expanduser()
        if path is not None and path.is_dir():
            found = {name: (path / name).read_bytes() for name in TOKENIZER_FILES if (path / name).is_file()}
            if found:
                return found
        if path is not None and path.is_file():
            return {"tokenizer.json": path.read_bytes(), "tokenizer_config.json": as_json(_TOKENIZER_CONFIG)}
        if self.tokenizer is not None:
            raise UserValueError(f"tokenizer={str(self.tokenizer)!r} is no tokenizer's file, and no folder with one")
        if isinstance(self.data, TokenDataModule):
            own = self.data.prepared.tokenizer
            end = own.tokenizer.id_to_token(own.end_of_document_id)
            return {
                "tokenizer.json": own.tokenizer.to_str(pretty=True).encode(),
                "tokenizer_config.json": as_json({**_TOKENIZER_CONFIG, "eos_token": end}),
            }
        return {}


_TOKENIZER_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast"}


# --- from a module


def save_module(module: LightningModule, folder: str | os.PathLike[str], exported: Exported) -> None:
    """Write a module's decoder, adapters merged into it; collective over the ranks that hold it.

    Raises:
        ValueError: no family has such a decoder, or an option is not legal.
        RuntimeError: a rank cannot write.
    """
    on_its_ranks(module, folder, lambda *where: _save(module, exported, *where))


def on_its_ranks(module: LightningModule, folder: str | os.PathLike[str], save: Save) -> None:
    """Call ``save`` with rank 0's folder, the topology and what broadcasts, on the ranks that hold a module."""
    strategy: Any = None if module._trainer is None else module.trainer.strategy
    topology: Topology | None = getattr(strategy, "topology", None)
    if topology is None:  # one process, or a strategy whose ranks all hold everything
        if strategy is None or strategy.is_global_zero:
            save(Path(folder), Topology.single(), lambda obj: obj)
        if strategy is not None:
            strategy.barrier()
        return
    save(Path(strategy.broadcast(os.fspath(folder))), topology, strategy.broadcast)


def _save(module: LightningModule, exported: Exported, folder: Path, topology: Topology, broadcast: Any) -> None:
    tensors = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in merged_state(module, topology).items()
        if name.startswith(PREFIX)
    }
    bindings, _ = bind(exported.family, exported.config)
    held = tensors[next(iter(bindings.pieces))].dtype
    dtype = exported.torch_dtype(held)
    weights = Weights(bindings, tensors, dtype, shard_bytes(exported.max_shard_size))
    parameters = sum(prod(shape) for _, shape in weights.kinds().values())
    files = exported.files(folder.name, dtype, parameters) if topology.world.rank == 0 else {}
    write_folder(folder, weights, files, topology.world, broadcast)


# --- from a checkpoint


def export(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    dtype: str | None = None,
    max_shard_size: str | int = SHARD_SIZE,
    tokenizer: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Write the model of a checkpoint, of either form and any layout, as a folder that transformers loads.

    One process does it, in the memory of a slab of a tensor. Adapters are merged into their matrices. Where the asked
    dtype has more digits than the weights and there are fp32 masters, these are written.

    Args:
        checkpoint: of a :class:`LanguageModel`.
        folder: is made.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; ``None``: as the published model has it that it began
            from, or as the checkpoint has it.
        max_shard_size: of one file.
        tokenizer: a folder or file whose tokenizer goes along; ``None``: that of the published model.

    Returns:
        what was written: ``family``, ``parameters``, ``dtype``.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is damaged, or of no LanguageModel, or no family has such a decoder; or it has adapters alone
            and the folder of the published model is gone or has changed.
    """
    source, top = opened(find(at(checkpoint)))
    config = top.get("hyper_parameters", {}).get("config")
    if not isinstance(config, Mapping):
        raise UserValueError(f"{checkpoint} is no checkpoint of a LanguageModel: it has no decoder's configuration")
    origin = Origin(**top[ORIGIN]) if ORIGIN in top else None
    exported = Exported(DecoderConfig(**config), origin, dtype, max_shard_size, tokenizer)
    bindings, shapes = bind(exported.family, exported.config)
    if LORA in top:
        source = merged_weights(source, top[LORA], exported.config, exported.family)
    if missing := [name for name in shapes if (MODEL, PREFIX + name) not in source.saved]:
        raise UserValueError(
            f"{checkpoint} lacks {', '.join(missing[:8])}: it holds only a part of the model's weights"
        )
    held = source.saved[MODEL, PREFIX + next(iter(bindings.pieces))].dtype
    written = exported.torch_dtype(held)
    tensors = {name: _lazily(source, name, shape, written) for name, shape in shapes.items()}
    weights = Weights(bindings, tensors, written, shard_bytes(max_shard_size))
    parameters = sum(prod(shape) for _, shape in weights.kinds().values())
    files = exported.files(Path(folder).name, written, parameters)
    if TOKENIZER_FILES[0] not in files:
        rank_zero_warn(f"no tokenizer goes to {folder}; legal: tokenizer (--tokenizer), a folder or file with one")
    write_folder(Path(folder), weights, files, Axis("world"), lambda obj: obj)
    return {
        "family": exported.family.model_type,
        "parameters": parameters,
        "dtype": str(written).removeprefix("torch."),
    }


def opened(path: Location) -> tuple[Source, Mapping[str, Any]]:
    """A checkpoint's tensors, and the rest of it."""
    if paths.is_directory(path):
        directory = Directory.verified(path)
        return directory, directory.trainer_state()
    content = load_file(path)
    version_of(content)
    if not isinstance(content.get("state_dict"), Mapping):
        raise UserTypeError(f"{path} has no 'state_dict': it is no checkpoint of a Trainer")
    return WholeTensors.of_model(content["state_dict"]), content


def _lazily(source: Source, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> GlobalTensor:
    """A parameter whose parts are read when they are asked for, slab after slab."""
    path: TensorPath = (MODEL, PREFIX + name)
    master: TensorPath = (OPTIMIZER, "state", PREFIX + name, MASTER)
    if master in source.saved and dtype.itemsize > source.saved[path].dtype.itemsize:
        path = master

    def parts() -> Iterator[Part]:
        for slab in slabs(Extent.whole(shape), source.saved[path].dtype.itemsize):
            yield Part(slab, lambda slab=slab: read(slab))  # type: ignore[misc]

    def read(slab: Extent) -> Tensor:
        memory = torch.empty(slab.sizes, dtype=source.saved[path].dtype)
        source.fill({path: GlobalTensor(shape, memory.dtype, [Part.of(slab.offsets, memory)])})
        return memory

    return GlobalTensor(shape, dtype, parts())


def shard_bytes(size: str | int) -> int:
    """``"5GB"`` in bytes.

    Raises:
        ValueError: it says no size.
    """
    match = re.fullmatch(r"(\d+)\s*(|KB|MB|GB)", str(size).upper())
    if match is None or not int(match[1]):
        raise UserValueError(f"max_shard_size={size!r}; legal: bytes, or such as 500MB or {SHARD_SIZE}")
    return int(match[1]) * _UNITS[match[2]]
