"""A model with more or fewer experts, written from any checkpoint or published folder, expert by expert."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lightning_tex.models.adapter_checkpoints import LORA
from lightning_tex.models.config import DecoderConfig
from lightning_tex.models.decoder import Decoder
from lightning_tex.models.exporting import SHARD_SIZE, Exported, opened, shard_bytes
from lightning_tex.models.families.family import Field
from lightning_tex.models.growth import Change, Growth
from lightning_tex.models.pretrained_model import PREFIX, PretrainedModel, bind
from lightning_tex.optim.formats import MASTER
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.extent import Extent
from lightning_tex.parallel.hashing import stable_hash
from lightning_tex.parallel.topology import Axis
from lightning_tex.pretrained.folder import CONFIG
from lightning_tex.pretrained.tensor_file import slabs
from lightning_tex.pretrained.writing import Weights, write_folder
from lightning_tex.saving import find
from lightning_tex.saving.global_tensor import GlobalTensor, Part
from lightning_tex.saving.model_state import MODEL, OPTIMIZER, Source, TensorPath
from lightning_tex.saving.weights_alone import write_weights

# E experts, H hidden width of one, D model width

_LAYER = ".mlp."
# Entries of a checkpoint that weights alone have.
_KEPT = ("pytorch-lightning_version", "epoch", "global_step", "hparams_name", "hyper_parameters", "pretrained")
# Of a layer, what has an entry for each expert in dim 0.
_OF_EXPERTS = ("router.", "experts.", "output_biases.")
# Matrices and biases of an expert, by the dim of hidden units in a layer's stacked parameter.
_HIDDEN_DIM = {"up": 1, "gate": 1, "down": 2, "up_bias": 1, "gate_bias": 1}
# By how much a sigmoid is above another at most: an expert with a bias that is lower by it is not chosen before.
_MOST = 1.0


@dataclass(frozen=True)
class Grown:
    """What was written.

    Args:
        config: of the new decoder.
        parameters: their number.
        differences: why its logits are not those of the old one but for rounding; empty: they are.
    """

    config: DecoderConfig
    parameters: int
    differences: tuple[str, ...]


def grow(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    growth: Growth,
    seed: int = 0,
    max_shard_size: str | int = SHARD_SIZE,
) -> Grown:
    """Write a model with more or fewer experts; one process, in the memory of a few matrices, whatever the layout was.

    Args:
        model: a checkpoint of a :class:`LanguageModel`, directory or file, of any layout; or a folder of pretrained
            weights.
        output: is made: of a checkpoint a checkpoint directory of the weights alone, which ``init_from`` begins with
            and ``export`` reads; of a folder a folder.
        growth: what becomes of the experts.
        seed: of the noise.
        max_shard_size: of one file of a folder.

    Raises:
        FileNotFoundError: there is no such model.
        FileExistsError: ``output`` exists.
        ValueError: it is damaged, is no LanguageModel's or has adapters, or numbers are not legal.
    """
    target = Path(output)
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists; nothing is written over it")
    folder = Path(model).expanduser()
    if (folder / CONFIG).is_file():
        return _grow_folder(str(folder), target, growth, seed, max_shard_size)
    source, top = opened(find(folder))
    given = top.get("hyper_parameters", {}).get("config")
    if not isinstance(given, Mapping):
        raise UserValueError(f"{model} is no checkpoint of a LanguageModel: it has no decoder's configuration")
    if LORA in top:
        raise UserValueError(f"{model} has adapters of lora; legal: the folder that `lightning-tex export` makes of it")
    old = DecoderConfig(**given)
    new, weights = growth.config(_with_experts(old, model)), _Weights(source, old, growth, seed)
    tensors = {path[1]: weights.of(path[1]) for path in source.saved if path[0] == MODEL}
    kept = {name: top[name] for name in _KEPT if name in top}
    kept["hyper_parameters"] = {**top["hyper_parameters"], "config": asdict(new)}
    write_weights(target, tensors, kept)
    return Grown(new, _parameters(new), tuple(growth.differences(old)))


def _grow_folder(name: str, target: Path, growth: Growth, seed: int, max_shard_size: str | int) -> Grown:
    model = PretrainedModel(name)
    old, family = _with_experts(model.config, name), model.family
    new = growth.config(old)
    if not any(isinstance(field, Field) and field.ours == "expert_hidden_dim" for field in family.fields):
        new = replace(new, hidden_dim=new.expert_hidden, expert_hidden_dim=None)
    exported = Exported(new, model.origin, max_shard_size=max_shard_size)
    bindings, shapes = bind(family, new)
    weights = _Weights(model.weights, old, growth, seed)
    dtype = exported.torch_dtype(torch.float32)
    tensors = {own: weights.of(PREFIX + own) for own in shapes}
    written = Weights(bindings, tensors, dtype, shard_bytes(max_shard_size))
    parameters = _parameters(new)
    files = exported.files(target.name, dtype, parameters)
    write_folder(target, written, files, Axis("world"), lambda obj: obj)
    return Grown(new, parameters, tuple(growth.differences(old)))


def _with_experts(config: DecoderConfig, model: object) -> DecoderConfig:
    if not any(map(config.has_experts, range(config.num_layers))):
        raise UserValueError(f"{model} has no experts; legal: a model with some, or `lightning-tex upcycle`")
    return config


def _parameters(config: DecoderConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(config).parameters())


@dataclass(frozen=True)
class _Weights:
    """New parameters, read part by part from the old ones."""

    source: Source
    old: DecoderConfig
    growth: Growth
    seed: int

    def of(self, name: str) -> GlobalTensor:
        """A parameter or buffer of a LanguageModel."""
        path, shape = self._path(name), tuple(self.source.saved[MODEL, name].shape)
        dtype = self.source.saved[path].dtype
        own = name.partition(_LAYER)[2]
        change = self._change(name)
        if change is None or not own.startswith(_OF_EXPERTS) or own.startswith("router.noise"):
            whole = slabs(Extent.whole(shape), dtype.itemsize)
            return GlobalTensor(shape, dtype, [Part(slab, partial(self._read, path, shape, slab)) for slab in whole])
        dim = _HIDDEN_DIM.get(own.removeprefix("experts."))
        sizes = list(shape)
        sizes[0] = len(change.sources)
        if dim is not None and change.parts > 1:
            sizes[dim] //= change.parts
        return GlobalTensor(tuple(sizes), dtype, list(self._parts(name, path, shape, tuple(sizes[1:]), dim, change)))

    def _parts(
        self,
        name: str,
        path: TensorPath,
        shape: tuple[int, ...],
        sizes: tuple[int, ...],
        dim: int | None,
        change: Change,
    ) -> Iterator[Part]:
        for number, old in enumerate(change.sources):
            offsets = [old, *[0] * len(sizes)]
            if dim is not None:
                offsets[dim] = number % change.parts * sizes[dim - 1]
            read = partial(self._expert, name, path, shape, Extent(tuple(offsets), (1, *sizes)), number, change)
            yield Part(Extent((number, *[0] * len(sizes)), (1, *sizes)), read)

    def _expert(
        self, name: str, path: TensorPath, shape: tuple[int, ...], extent: Extent, number: int, change: Change
    ) -> Tensor:
        values, own = self._read(path, shape, extent), name.partition(_LAYER)[2]
        if self.growth.noise and change.is_copy(number) and own != "router.correction_bias":
            draw = torch.Generator().manual_seed(stable_hash(self.seed, name, number))
            std = values.std() if values.numel() > 1 else values.abs().mean()
            values += (self.growth.noise * std * torch.randn(values.shape, generator=draw)).to(values.dtype)
        if own == "router.correction_bias" and number in change.added:
            values.fill_(self._read(path, shape, Extent.whole(shape)).min() - _MOST)
        if own == "experts.down":
            values *= change.weight * change.parts
        if own.startswith("output_biases."):
            values *= change.weight
        return values

    def _change(self, name: str) -> Change | None:
        before, middle, _ = name.partition(_LAYER)
        block = before.rpartition(".")[2]
        if not middle or not block.isdigit() or not self.old.has_experts(int(block)):
            return None
        return self.growth.change(self.old, int(block))

    def _path(self, name: str) -> TensorPath:
        """Of its value in most digits: the fp32 master's where there is one."""
        master: TensorPath = (OPTIMIZER, "state", name, MASTER)
        return master if master in self.source.saved else (MODEL, name)

    def _read(self, path: TensorPath, shape: tuple[int, ...], extent: Extent) -> Tensor:
        memory = torch.empty(extent.sizes, dtype=self.source.saved[path].dtype)
        self.source.fill({path: GlobalTensor(shape, memory.dtype, [Part.of(extent.offsets, memory)])})
        return memory
