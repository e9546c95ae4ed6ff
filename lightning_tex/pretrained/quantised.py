"""Quantised weights, multiplied out while they are read: of each tensor the blocks that the wanted elements are in.

Two formats, as ``quantization_config`` in ``config.json`` names them:

    fp8     X in e4m3, [.., N, K], and X_scale_inv, a factor for each block (DeepSeek-V3, arXiv 2412.19437, 3.3)
    mxfp4   X_blocks, [E, N, K / 32, 16] bytes of two e2m1 numbers, the lower four bits first, and X_scales,
            [E, N, K / 32] exponents e8m0, each of 32 numbers (OCP Microscaling Formats 1.0, 5); X is [E, K, N]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import nan
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_tex.parallel.extent import Extent
from lightning_tex.pretrained.tensor_file import Readable, StoredTensor, TensorFiles

CONFIG_KEY = "quantization_config"

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NIBBLES = (*_E2M1, *(-number for number in _E2M1))
# Both numbers of a byte, and the number that an exponent is.
_PAIRS = torch.tensor([[_NIBBLES[byte & 15], _NIBBLES[byte >> 4]] for byte in range(256)])  # [256, 2]
_POWERS = torch.tensor([2.0 ** (exponent - 127) for exponent in range(255)] + [nan])
_MX_BLOCK = 32
_AT_ONCE = 1 << 15  # blocks: what an index takes beside the numbers is small

Problems = list[str]


@dataclass(frozen=True)
class BlockScaled:
    """A tensor in e4m3 with a factor for each block of its last two dims; elements are read in fp32.

    Args:
        values: the tensor, [.., N, K].
        scales: [.., N / rows of a block, K / its columns], rounded up.
        block: rows and columns of a block.
    """

    values: StoredTensor
    scales: StoredTensor
    block: tuple[int, int]
    dtype: ClassVar[torch.dtype] = torch.float32

    @property
    def name(self) -> str:
        return self.values.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def read(self, files: TensorFiles, extent: Extent) -> Tensor:
        """Some elements, and no other bytes than theirs and their blocks' factors."""
        numbers = files.read(self.values, extent).to(self.dtype)
        (offsets, sizes), leading = _covering(extent, self.block), len(extent.sizes) - 2
        blocks = Extent((*extent.offsets[:leading], *offsets), (*extent.sizes[:leading], *sizes))
        scales = files.read(self.scales, blocks).to(self.dtype)
        first, column = extent.offsets[leading:]
        begin = column - offsets[1] * self.block[1]
        scales = scales.repeat_interleave(self.block[1], -1)[..., begin : begin + extent.sizes[-1]]
        for number in range(sizes[0]):
            start = (offsets[0] + number) * self.block[0] - first
            numbers[..., max(0, start) : start + self.block[0], :] *= scales[..., number : number + 1, :]
        return numbers


@dataclass(frozen=True)
class PackedFloat4:
    """A tensor of e2m1 numbers, two a byte, 32 of which share an exponent; elements are read in fp32, which is exact.

    Args:
        name: of the tensor, which no file has.
        blocks: [E, N, K / 32, 16].
        scales: [E, N, K / 32].
    """

    name: str
    blocks: StoredTensor
    scales: StoredTensor
    dtype: ClassVar[torch.dtype] = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """[E, K, N]"""
        experts, rows, groups, _ = self.blocks.shape
        return experts, groups * _MX_BLOCK, rows

    def read(self, files: TensorFiles, extent: Extent) -> Tensor:
        """Some elements, and no other bytes than those of the blocks that they are in."""
        (expert, inner, row), (experts, inners, rows) = extent.offsets, extent.sizes
        ((_, group), (_, groups)) = _covering(Extent((0, inner), (1, inners)), (1, _MX_BLOCK))
        shared = Extent((expert, row, group), (experts, rows, groups))
        packed = files.read(self.blocks, Extent((*shared.offsets, 0), (*shared.sizes, _MX_BLOCK // 2)))
        powers = _POWERS[files.read(self.scales, shared).int()]
        numbers = _unpacked(packed.flatten(0, -2), powers.flatten()).view(experts, rows, groups * _MX_BLOCK)
        begin = inner - group * _MX_BLOCK
        return numbers[..., begin : begin + inners].mT


def _unpacked(packed: Tensor, powers: Tensor) -> Tensor:  # [blocks, 16], [blocks] -> [blocks, 32]
    numbers = torch.empty(len(packed), _MX_BLOCK)
    for part, pairs, power in zip(*(tensor.split(_AT_ONCE) for tensor in (numbers, packed, powers)), strict=True):
        torch.index_select(_PAIRS, 0, pairs.flatten().int(), out=part.view(-1, 2))
        part.mul_(power.unsqueeze(-1))
    return numbers


def _covering(extent: Extent, block: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of blocks of the last two dims those that an extent touches: the first of each dim, and how many."""
    firsts = [offset // size for offset, size in zip(extent.offsets[-2:], block, strict=True)]
    stops = [-(-stop // size) for stop, size in zip(extent.stops[-2:], block, strict=True)]
    return (firsts[0], firsts[1]), (stops[0] - firsts[0], stops[1] - firsts[1])


def multiplied_out(
    stored: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> tuple[dict[str, Readable], Problems]:
    """The tensors of a folder with those that are quantised in the place of what they are made of.

    Args:
        stored: by name in files.
        config: ``config.json``.

    Returns:
        the tensors by name, and what is wrong, with names.
    """
    given = config.get(CONFIG_KEY)
    if given is None:
        return dict(stored), []
    method = given.get("quant_method") if isinstance(given, Mapping) else given
    if method not in _METHODS:
        return {}, [f"{CONFIG_KEY} has quant_method={method!r}; legal: {', '.join(map(repr, _METHODS))}"]
    return _METHODS[method](stored, given)


def _fp8(stored: Mapping[str, StoredTensor], given: Mapping[str, Any]) -> tuple[dict[str, Readable], Problems]:
    block = given.get("weight_block_size")
    if not (isinstance(block, (list, tuple)) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        return {}, [f"{CONFIG_KEY} of 'fp8' has weight_block_size={block!r}; legal: two sizes, such as [128, 128]"]
    tensors: dict[str, Readable] = dict(stored)
    problems: Problems = []
    for name, values in stored.items():
        if values.dtype != torch.float8_e4m3fn:
            continue
        if len(values.shape) < 2:
            problems.append(f"{name} of shape {list(values.shape)} is in float8_e4m3fn; legal: at least two dims")
            continue
        rows, columns = (-(-size // of) for size, of in zip(values.shape[-2:], block, strict=True))
        scales = _partner(stored, f"{name}_scale_inv", name, (*values.shape[:-2], rows, columns), _FLOATS, problems)
        if scales is not None:
            tensors[name] = BlockScaled(values, scales, (block[0], block[1]))
            del tensors[scales.name]
    return tensors, problems


def _mxfp4(stored: Mapping[str, StoredTensor], _: Mapping[str, Any]) -> tuple[dict[str, Readable], Problems]:
    tensors: dict[str, Readable] = dict(stored)
    problems: Problems = []
    for name, blocks in stored.items():
        if not name.endswith(_BLOCKS):
            continue
        if blocks.dtype != torch.uint8 or len(blocks.shape) != 4 or blocks.shape[-1] != _MX_BLOCK // 2:
            problems.append(
                f"{name} is of {_kind(blocks)}; legal: uint8 of shape [experts, rows, columns / 32, {_MX_BLOCK // 2}]"
            )
            continue
        whole = name.removesuffix(_BLOCKS)
        scales = _partner(stored, f"{whole}{_SCALES}", name, blocks.shape[:-1], (torch.uint8,), problems)
        if whole in stored:
            problems.append(f"{whole} is there besides {name}")
        elif scales is not None:
            tensors[whole] = PackedFloat4(whole, blocks, scales)
            del tensors[name], tensors[scales.name]
    return tensors, problems


def _partner(
    stored: Mapping[str, StoredTensor],
    name: str,
    of: str,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    problems: Problems,
) -> StoredTensor | None:
    """The scales of a tensor, if they are there and of the right kind."""
    if (found := stored.get(name)) is None:
        problems.append(f"{name} is missing, the scales of {of}")
    elif found.shape != shape or found.dtype not in dtypes:
        legal = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        problems.append(f"{name} is of {_kind(found)}; legal, as the scales of {of}: {legal} of shape {list(shape)}")
    else:
        return found
    return None


def _kind(tensor: StoredTensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"


_BLOCKS, _SCALES = "_blocks", "_scales"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_METHODS: dict[str, Callable[[Mapping[str, StoredTensor], Mapping[str, Any]], tuple[dict[str, Readable], Problems]]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
}
