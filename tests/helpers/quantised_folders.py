"""Published models whose weights are quantised, and the same numbers by the formats' plain definitions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers.published_folders import changed_config, publish, tensors
from lightning_tex.pretrained.folder import INDEX

# By format: the family's case and sizes of which every scale, but for the last of a dim, belongs to a whole block.
FORMATS = {
    "fp8": ("deepseek-v3", {"intermediate_size": 96}),
    "mxfp4": ("gpt-oss", {"hidden_size": 64, "intermediate_size": 96}),
}
BLOCK = (16, 24)


def quantised(kind: str, folder: Path, block: tuple[int, int] = BLOCK, **options: Any) -> Path:
    """A folder whose projections are quantised, beside ``folder, plain``: what they are, in fp32, by definition.

    ``block`` is of fp8.
    """
    case, sizes = FORMATS[kind]
    publish(case, folder, torch.bfloat16, shard="1GB", **{**sizes, **options})
    content = tensors(folder)
    plain, packed = _fp8(content, block) if kind == "fp8" else _mxfp4(content)
    for place, weights in ((folder, packed), (folder.with_name(f"{folder.name}, plain"), plain)):
        place.mkdir(exist_ok=True)
        _write(place, weights)
    text = (folder / "config.json").read_text()
    (folder.with_name(f"{folder.name}, plain") / "config.json").write_text(text)
    given = _CONFIGS[kind] | ({"weight_block_size": list(block)} if kind == "fp8" else {})
    changed_config(folder, lambda config: config.update(quantization_config=given))
    return folder


def _write(folder: Path, weights: dict[str, Tensor]) -> None:
    """In two files."""
    names = sorted(weights)
    halves = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    (folder / "model.safetensors").unlink(missing_ok=True)
    for file, members in halves.items():
        save_file({name: weights[name].contiguous() for name in members}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, members in halves.items() for name in members}}
    (folder / INDEX).write_text(json.dumps(index))


def _fp8(content: dict[str, Tensor], block: tuple[int, int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    plain, packed = dict(content), dict(content)
    for name, weight in content.items():
        if "_proj" not in name or weight.dim() != 2:
            continue
        grid = tuple(-(-size // of) for size, of in zip(weight.shape, block, strict=True))
        scales = torch.rand(grid) + 0.01
        packed[name] = (weight.float() * 100).to(torch.float8_e4m3fn)
        packed[f"{name}_scale_inv"] = scales
        plain[name] = plain_fp8(packed[name], scales, block)
    return plain, packed


def _mxfp4(content: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    plain, packed = dict(content), dict(content)
    for name, weight in content.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        experts, inner, rows = weight.shape
        blocks = torch.randint(0, 256, (experts, rows, inner // 32, 16), dtype=torch.uint8)
        scales = torch.randint(119, 127, (experts, rows, inner // 32), dtype=torch.uint8)
        del packed[name]
        packed[f"{name}_blocks"], packed[f"{name}_scales"] = blocks, scales
        plain[name] = plain_mxfp4(blocks, scales)
    return plain, packed


_CONFIGS = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}


# --- the formats, number by number


def _float(bits: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """Of a sign, an exponent and a mantissa, without what stands for infinities and NaN."""
    sign = -1.0 if bits >> (exponent_bits + mantissa_bits) else 1.0
    exponent, mantissa = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1), bits & ((1 << mantissa_bits) - 1)
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


def plain_e4m3(bits: int) -> float:
    """OCP 8-bit floating point 1.0, E4M3: no infinity, NaN where all of exponent and mantissa is set."""
    return math.nan if bits & 127 == 127 else _float(bits, 4, 3, 7)


def plain_e2m1(bits: int) -> float:
    """OCP Microscaling Formats 1.0, section 5.3.3."""
    return _float(bits, 2, 1, 1)


def plain_e8m0(bits: int) -> float:
    """Section 5.4.1 there."""
    return math.nan if bits == 255 else 2.0 ** (bits - 127)


def plain_fp8(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Each number times its block's factor, rounded once to fp32."""
    given, result = values.view(torch.uint8).numpy(), np.empty(tuple(values.shape), np.float32)
    for row, column in np.ndindex(*result.shape):
        factor = np.float32(scales[row // block[0], column // block[1]].item())
        result[row, column] = np.float32(plain_e4m3(int(given[row, column]))) * factor
    return torch.from_numpy(result)


def plain_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """[E, N, G, 16] bytes and [E, N, G] exponents -> [E, 32 G, N]."""
    given, exponents = blocks.numpy(), scales.numpy()
    experts, rows, groups, _ = given.shape
    result = np.empty((experts, groups * 32, rows), np.float32)
    numbers, powers = [plain_e2m1(bits) for bits in range(16)], [plain_e8m0(bits) for bits in range(256)]
    for expert, inner, row in np.ndindex(*result.shape):
        group, place = divmod(inner, 32)
        byte = int(given[expert, row, group, place // 2])
        nibble = byte >> 4 if place % 2 else byte & 15
        result[expert, inner, row] = numbers[nibble] * powers[int(exponents[expert, row, group])]
    return torch.from_numpy(result)
