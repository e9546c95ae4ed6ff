"""A dense published model made into one of experts, which are copies of its MLPs (arXiv 2212.05055, 2410.07524)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tex.models.config import DecoderConfig
from lightning_tex.models.exporting import SHARD_SIZE, Exported, shard_bytes
from lightning_tex.models.families import FAMILIES
from lightning_tex.models.families.family import Family, Field
from lightning_tex.models.pretrained_model import PretrainedModel, bind
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.extent import Extent
from lightning_tex.parallel.hashing import stable_hash
from lightning_tex.parallel.topology import Axis
from lightning_tex.pretrained.reading import PretrainedWeights
from lightning_tex.pretrained.writing import Weights, write_folder
from lightning_tex.saving.global_tensor import GlobalTensor, Part
from lightning_tex.saving.model_state import MODEL

# D model width, H hidden width of the dense model's MLPs, n copies, g parts of each, s parts that all share,
# W = H / (s + g) hidden width of a part, E = g n experts


@dataclass(frozen=True)
class Upcycling:
    """How experts are made of an MLP.

    Args:
        num_experts: n, copies of the MLP.
        top_k: copies that a token uses.
        granularity: g; each copy is cut into so many experts of W hidden units, of which a token uses g * top_k.
            Experts of one copy begin with the same row of the router, and outputs are multiplied by g.
        shared_experts: s; the MLP's first s W hidden units are no part of the copies, but one expert that every token
            uses.
        noise: standard deviation of what is added to each routed expert's weights, relative to theirs.
        seed: of noise and routers.

    Raises:
        ValueError: numbers that are not legal.
    """

    num_experts: int
    top_k: int
    granularity: int = 1
    noise: float = 0.0
    seed: int = 0
    shared_experts: int = 0

    def __post_init__(self) -> None:
        some = self.num_experts >= 2 and 1 <= self.top_k <= self.num_experts and self.granularity >= 1
        if not some or self.noise < 0 or self.shared_experts < 0:
            raise UserValueError(
                f"num_experts={self.num_experts}, top_k={self.top_k}, granularity={self.granularity}, "
                f"noise={self.noise}, shared_experts={self.shared_experts}; legal: at least 2, 1 to num_experts, at "
                "least 1, at least 0, at least 0"
            )

    def families(self, dense: Family) -> tuple[str, ...]:
        """Those that may have such a decoder."""
        return dense.with_shared_expert if self.shared_experts else dense.with_experts

    def made(self, dense: PretrainedModel) -> tuple[Family, DecoderConfig]:
        """The family and the configuration of the model with experts.

        Raises:
            ValueError: the model is not dense, its MLPs cannot be cut so, or no family has such a decoder.
        """
        names = self.families(dense.family)
        if not names:
            legal = ", ".join(name for name, family in FAMILIES.items() if self.families(family))
            raise UserValueError(
                f"{dense.origin.name} is a {dense.family.model_type}, which is not made into experts; legal: {legal}"
            )
        reasons = []
        for family in map(FAMILIES.__getitem__, names):
            config = self.config(dense.config, family)
            try:
                family.described(config)
            except UserValueError as error:
                reasons.append(str(error))
            else:
                return family, config
        raise UserValueError("; ".join(reasons))

    def config(self, dense: DecoderConfig, family: Family) -> DecoderConfig:
        """Of the model with experts in every block.

        Raises:
            ValueError: the MLPs cannot be cut so.
        """
        parts = self.shared_experts + self.granularity
        if dense.hidden % parts:
            given = f"granularity={self.granularity}"
            given += f" and shared_experts={self.shared_experts}, {parts} parts," if self.shared_experts else ""
            raise UserValueError(f"{given} does not divide the MLPs' hidden_dim={dense.hidden}")
        width = dense.hidden // parts
        own_width = any(isinstance(field, Field) and field.ours == "expert_hidden_dim" for field in family.fields)
        widths: dict[str, Any] = {"expert_hidden_dim": width} if own_width else {"hidden_dim": width}
        config = replace(
            dense,
            **widths,
            num_experts=self.num_experts * self.granularity,
            top_k=self.top_k * self.granularity,
            moe_every=1,
            norm_topk_prob=True,
            shared_expert_hidden_dim=self.shared_experts * width or None,
        )
        # How tokens choose, and whether a gate is before the shared expert, is the family's.
        own = family.config(family.write(config))
        return replace(config, router=own.router, shared_expert_gate=own.shared_expert_gate)


def upcycle(
    dense: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    num_experts: int,
    top_k: int,
    granularity: int = 1,
    noise: float = 0.0,
    seed: int = 0,
    revision: str | None = None,
    max_shard_size: str | int = SHARD_SIZE,
    shared_experts: int = 0,
) -> dict[str, Any]:
    """Write a folder of a model whose experts are copies of a dense published model's MLPs, or of a part of them.

    Without noise its logits are the dense model's at the start: a token's weights sum to 1, and all its experts agree.
    One process does it, in the memory of a few matrices.

    Args:
        dense: a folder or repository of a Llama, Mistral or Qwen3.
        folder: is made.
        num_experts, top_k, granularity, noise, seed, shared_experts: see :class:`Upcycling`.
        revision: of a repository.
        max_shard_size: of one file.

    Returns:
        what was written: ``family``, ``parameters``, ``num_experts``, ``top_k``.

    Raises:
        ValueError: a model that is not dense, or that its family has with experts no more; numbers that are not legal.
    """
    model = PretrainedModel(os.fspath(dense), revision)
    how = Upcycling(num_experts, top_k, granularity, noise, seed, shared_experts)
    family, config = how.made(model)
    merged = {**model.folder.config, **family.described(config)}
    exported = Exported(config, replace(model.origin, config=merged), max_shard_size=max_shard_size)
    bindings, shapes = bind(family, config)
    parts = _Parts(model.weights, how, config.shared_expert_gate)
    dtype = exported.torch_dtype(torch.float32)
    tensors = {name: GlobalTensor(shape, dtype, parts.of(name, shape)) for name, shape in shapes.items()}
    weights = Weights(bindings, tensors, dtype, shard_bytes(max_shard_size))
    parameters = sum(prod(shape) for _, shape in weights.kinds().values())
    files = exported.files(Path(folder).name, dtype, parameters)
    write_folder(Path(folder), weights, files, Axis("world"), lambda obj: obj)
    return {"family": family.model_type, "parameters": parameters, "num_experts": config.num_experts,
            "top_k": config.top_k}  # fmt: skip


@dataclass(frozen=True)
class _Parts:
    """Parameters with experts, read part by part from the dense ones."""

    dense: PretrainedWeights
    how: Upcycling
    gated: bool

    def of(self, name: str, shape: tuple[int, ...]) -> Iterator[Part]:
        """The parts of a parameter."""
        if name.endswith(".mlp.router.weight"):
            yield Part(Extent.whole(shape), partial(self._router, name, shape))
        elif name.endswith(".correction_bias"):
            yield Part(Extent.whole(shape), partial(torch.zeros, shape))
        elif ".mlp.shared." in name:
            yield Part(Extent.whole(shape), partial(self._shared, name, shape))
        elif ".mlp.experts." in name:
            for expert in range(shape[0]):
                extent = Extent((expert, 0, 0), (1, *shape[1:]))
                yield Part(extent, partial(self._expert, name, expert, shape[1:]))
        else:
            yield Part(Extent.whole(shape), partial(self._read, name, Extent.whole(shape)))

    def _read(self, name: str, extent: Extent) -> Tensor:
        path = (MODEL, f"decoder.{name}")
        memory = torch.empty(extent.sizes)
        part = Part.of(extent.offsets, memory)
        self.dense.fill({path: GlobalTensor(tuple(self.dense.saved[path].shape), memory.dtype, [part])})
        return memory

    def _expert(self, name: str, expert: int, sizes: tuple[int, ...]) -> Tensor:  # [1, W, D] or [1, D, W]
        matrix = name.rpartition(".")[2]
        number, down = self.how.shared_experts + expert % self.how.granularity, matrix == "down"
        offsets = (0, number * sizes[1]) if down else (number * sizes[0], 0)
        weights = self._read(f"{name.partition('.experts.')[0]}.{matrix}.weight", Extent(offsets, sizes))
        if self.how.noise:
            weights += self.how.noise * weights.std() * torch.randn(sizes, generator=self._draw(name, expert))
        return weights.mul_(self.how.granularity if down else 1).unsqueeze(0)

    def _shared(self, name: str, shape: tuple[int, ...]) -> Tensor:  # [s W, D] or [D, s W]; a gate: [1, D]
        block, _, kind = name.partition(".shared.")
        if kind == "output_gate.weight":
            return torch.zeros(shape)
        weights = self._read(f"{block}.{kind}", Extent((0, 0), shape))
        # A gate of zeros halves what comes of it.
        return weights.mul_(2 if self.gated and kind == "down.weight" else 1)

    def _router(self, name: str, shape: tuple[int, ...]) -> Tensor:  # [E g, D]
        rows = torch.rand(self.how.num_experts, shape[1], generator=self._draw(name, 0)).mul_(2).sub_(1)
        return rows.div_(sqrt(shape[1])).repeat_interleave(self.how.granularity, 0)

    def _draw(self, name: str, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(stable_hash(self.how.seed, name, number) % 2**63)
