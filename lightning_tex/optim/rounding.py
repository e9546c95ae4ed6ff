"""Random bits for stochastic rounding: a hash of (seed, step, name, global index), so that no layout changes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_tex.drawing import stable_hash
from lightning_tex.optim.flat import Entry
from lightning_tex.placement import Box


@dataclass
class Dice:
    """What all shards' random bits depend on: the seed, equal on all ranks, and the steps taken."""

    seed: int = 0
    step: int = 0

    def restore(self, saved: Mapping[str, int] | None) -> None:
        """Go on where a checkpoint was written, if it says."""
        if saved is not None:
            self.seed, self.step = saved["seed"], saved["step"]


class Rounding:
    """Random bits for the elements of one shard.

    Args:
        dice: seed and step.
        entries: the parameters of the shard's buffer.
        own_start: where the shard begins in the buffer, in elements.
        device: of the bits.
    """

    def __init__(self, dice: Dice, entries: Sequence[Entry], own_start: int, device: torch.device) -> None:
        self.dice, self.entries, self.own_start, self.device = dice, entries, own_start, device

    def bits(self, span: slice, key: str) -> Tensor:
        """16 random bits per element, for the step's rounding of ``key``. [n] int32"""
        device = self.device
        first, last = self.own_start + span.start, self.own_start + span.stop
        bits = torch.zeros(last - first, dtype=torch.int32, device=device)
        for entry in self.entries:
            start, stop = max(entry.start, first), min(entry.stop, last)
            if start < stop:
                placement = entry.placement
                salt = stable_hash(self.dice.seed, self.dice.step, placement.name, key)
                index = global_index(placement.box, start - entry.start, stop - entry.start, device)
                bits[start - first : stop - first] = _mixed(index, salt)
        return bits


def global_index(box: Box, start: int, stop: int, device: torch.device) -> Tensor:
    """Index in the whole, flattened tensor of elements ``start`` to ``stop`` of a stored, flattened part. [n] int64"""
    index = torch.arange(start, stop, device=device)
    if box.stored[1:] == box.whole[1:]:  # a run of the whole tensor
        row = 1
        for length in box.whole[1:]:
            row *= length
        return index.add_(box.offsets[0] * row if box.offsets else 0)
    result = torch.zeros_like(index)
    stride = 1
    for stored, whole, offset in reversed(list(zip(box.stored, box.whole, box.offsets, strict=True))):
        result += (index % stored + offset) * stride
        index = index // stored
        stride *= whole
    return result


def _mixed(index: Tensor, salt: int) -> Tensor:
    """The low 16 bits of murmur3's finaliser, which lets every bit of the index reach every bit of the result."""
    high = (index >> 32).to(torch.int32)
    h = index.to(torch.int32).bitwise_xor_(_int32(salt)).add_(high.mul_(_int32(0x9E3779B1)))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h.bitwise_xor_((h >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(_int32(factor))
    return h.bitwise_xor_(h >> 16).bitwise_and_(0xFFFF)


def _int32(n: int) -> int:
    return (n + 2**31) % 2**32 - 2**31


def round_stochastically(values: Tensor, bits: Tensor, out: Tensor) -> None:
    """Round fp32 to bf16, up with the probability that makes it right on average.

    Args:
        values: [n] fp32, used up.
        bits: 16 random bits each. [n] int32, used up
        out: [n] bf16
    """
    rounded = bits.add_(values.view(torch.int32)).bitwise_right_shift_(16)
    out.view(torch.int16).copy_(rounded)
