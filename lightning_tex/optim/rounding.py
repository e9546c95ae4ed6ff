"""Random bits for stochastic rounding: a hash of (seed, step, name, global index), so that no layout changes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lightning_tex.optim.flat import Entry
from lightning_tex.parallel.hashing import stable_hash
from lightning_tex.parallel.sharding import Box


@dataclass
class RoundingSeed:
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
        rounding_seed: seed and step.
        entries: the parameters of the shard's buffer.
        own_start: where the shard begins in the buffer, in elements.
        device: of the bits.
    """

    def __init__(
        self, rounding_seed: RoundingSeed, entries: Sequence[Entry], own_start: int, device: torch.device
    ) -> None:
        self.rounding_seed, self.entries, self.own_start, self.device = rounding_seed, entries, own_start, device

    def bits(self, span: slice, key: str) -> Tensor:
        """16 random bits per element, for the step's rounding of ``key``. [n] int32"""
        device = self.device
        first, last = self.own_start + span.start, self.own_start + span.stop
        bits = torch.empty(last - first, dtype=torch.int32, device=device)
        done = first
        for entry in self.entries:
            start, stop = max(entry.start, first), min(entry.stop, last)
            if start < stop:
                sharding = entry.sharding
                salt = stable_hash(self.rounding_seed.seed, self.rounding_seed.step, sharding.name, key)
                bits[done - first : start - first] = 0  # between parameters
                _hash(sharding.box, start - entry.start, salt, out=bits[start - first : stop - first])
                done = stop
        bits[done - first :] = 0
        return bits


def global_index(box: Box, start: int, stop: int, device: torch.device) -> Tensor:
    """Index in the whole, flattened tensor of elements ``start`` to ``stop`` of a stored, flattened part.

    [n] int32 where that is enough, else int64.
    """
    dtype = torch.int32 if _is_small(box) else torch.int64
    if box.stored[1:] == box.full[1:]:  # a run of the whole tensor
        return torch.arange(_run_start(box) + start, _run_start(box) + stop, dtype=dtype, device=device)
    index = torch.arange(start, stop, dtype=dtype, device=device)
    result = torch.zeros_like(index)
    stride = 1
    for stored, whole, offset in reversed(list(zip(box.stored, box.full, box.extent.offsets, strict=True))):
        result += (index % stored + offset) * stride
        index = index // stored
        stride *= whole
    return result


def _is_small(box: Box) -> bool:
    return prod(box.full) + prod(box.stored) < 2**31


def _run_start(box: Box) -> int:
    return box.extent.offsets[0] * prod(box.full[1:]) if box.full else 0


def _hash(box: Box, start: int, salt: int, out: Tensor) -> None:
    """Hash the global index of the elements from ``start`` on of a stored, flattened part.

    Two rounds of multiply and shift, whose upper half every bit of the index reaches.

    Args:
        out: for 16 bits each. [n] int32
    """
    if _is_small(box) and box.stored[1:] == box.full[1:]:
        _count(_run_start(box) + start + salt, out)
    else:
        index = global_index(box, start, start + len(out), out.device)
        if index.dtype == torch.int64:
            index = index.to(torch.int32).bitwise_xor_((index >> 32).to(torch.int32).mul_(_int32(0xC2B2AE35)))
        torch.add(index, _int32(salt), out=out)
    out.mul_(_int32(0x9E3779B1))
    out.bitwise_xor_(out >> 15).mul_(_int32(0x85EBCA6B)).bitwise_right_shift_(16).bitwise_and_(0xFFFF)


def _count(first: int, out: Tensor) -> None:
    """Fill with consecutive numbers, modulo 2^32: several times as fast as ``arange``, which only begins it."""
    step = 1 << 16
    numbers = out[:step]
    torch.arange(len(numbers), dtype=torch.int32, device=out.device, out=numbers)
    for start in range(step, len(out), step):
        part = out[start : start + step]
        torch.add(numbers[: len(part)], _int32(first + start), out=part)
    numbers.add_(_int32(first))


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
