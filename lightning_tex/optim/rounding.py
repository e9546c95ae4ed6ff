"""Random bits for stochastic rounding: a hash of (seed, step, name, global index), so that no layout changes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lightning_tex.optim.flat import Entry
from lightning_tex.parallel.box import Box
from lightning_tex.parallel.compiled import leaf
from lightning_tex.parallel.device import device_type
from lightning_tex.parallel.hashing import stable_hash


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
        self._tables: dict[Box, Tensor] = {}  # to send one to a device waits for it

    def bits(self, span: slice, key: str) -> Tensor:
        """16 random bits per element, for the step's rounding of ``key``. [n] int32"""
        first, last = self.own_start + span.start, self.own_start + span.stop
        bits = torch.empty(last - first, dtype=torch.int32, device=self.device)
        done = first
        for entry in self.entries:
            start, stop = max(entry.start, first), min(entry.stop, last)
            if start < stop:
                sharding = entry.sharding
                salt = stable_hash(self.rounding_seed.seed, self.rounding_seed.step, sharding.name, key)
                if done < start:
                    bits[done - first : start - first] = 0  # between parameters
                self._hash(sharding.box, start - entry.start, salt, out=bits[start - first : stop - first])
                done = stop
        if done < last:
            bits[done - first :] = 0
        return bits

    def _hash(self, box: Box, start: int, salt: int, out: Tensor) -> None:
        """Hash the global index of the elements from ``start`` on of a stored, flattened part.

        Args:
            box: which part of the whole tensor that is.
            start: the first of the elements.
            salt: of the hash.
            out: for 16 bits each. [n] int32
        """
        if _is_small(box) and _is_run(box):
            count(out)
            out.add_(_int32(_run_start(box) + start + salt))
        else:
            if box not in self._tables:
                self._tables[box] = table_of(box, self.device)
            index = global_index(box, start, start + len(out), self._tables[box])
            torch.add(fold(index) if index.dtype == torch.int64 else index, _int32(salt), out=out)
        mix(out)


def global_index(box: Box, start: int, stop: int, table: Tensor) -> Tensor:
    """Index in the whole, flattened tensor of elements ``start`` to ``stop`` of a stored, flattened part.

    Args:
        box: which part of the whole tensor is stored.
        start, stop: which elements.
        table: :func:`table_of` the box, on the device of the result.

    Returns:
        [n] int32 where that is enough, else int64.
    """
    dtype = torch.int32 if _is_small(box) else torch.int64
    if _is_run(box):
        return torch.arange(_run_start(box) + start, _run_start(box) + stop, dtype=dtype, device=table.device)
    return whole_index(torch.arange(start, stop, dtype=dtype, device=table.device), table=table)


def _is_small(box: Box) -> bool:
    return prod(box.full) + prod(box.stored) < 2**31


def _is_run(box: Box) -> bool:
    """Whether the stored part is a run of the whole tensor."""
    return box.stored[1:] == box.full[1:]


def _run_start(box: Box) -> int:
    return box.extent.offsets[0] * prod(box.full[1:]) if box.full else 0


def table_of(box: Box, device: torch.device) -> Tensor:
    """Of each dim, the last one first: its stored length, where that begins, and its stride. [dims, 3]"""
    strides = [prod(box.full[dim + 1 :]) for dim in range(len(box.full))]
    rows = list(zip(box.stored, box.extent.offsets, strides, strict=True))
    return torch.tensor(rows[::-1], device=device)


@leaf
def whole_index(index: Tensor, table: Tensor) -> Tensor:
    """Index in the whole tensor of elements of a part.

    Args:
        index: in the part, flattened. [n]
        table: of the part. [dims, 3]
    """
    result = torch.zeros_like(index)
    for length, offset, stride in table.unbind():
        result += (index % length + offset) * stride
        index = index // length
    return result


@leaf
def fold(index: Tensor) -> Tensor:
    """32 bits of 64. [n] int64 -> [n] int32"""
    return index.to(torch.int32).bitwise_xor_((index >> 32).to(torch.int32).mul_(_int32(0xC2B2AE35)))


@leaf
def mix(numbers: Tensor) -> None:
    """Two rounds of multiply and shift, in place: every bit reaches the upper half, which is kept. [n] int32"""
    numbers.mul_(_int32(0x9E3779B1))
    numbers.bitwise_xor_(numbers >> 15).mul_(_int32(0x85EBCA6B)).bitwise_right_shift_(16).bitwise_and_(0xFFFF)


def count(out: Tensor) -> None:
    """Fill with 0, 1, 2 and so on: on CPU as a sum of rows and columns, four times as fast as ``arange``. [n] int32"""
    n, width = len(out), 256
    if device_type(out) != "cpu":
        torch.arange(n, dtype=torch.int32, device=out.device, out=out)
        return
    whole = n // width * width
    columns = torch.arange(width, dtype=torch.int32, device=out.device)
    rows = torch.arange(0, whole, width, dtype=torch.int32, device=out.device)
    torch.add(rows[:, None], columns, out=out[:whole].view(-1, width))
    torch.add(columns[: n - whole], whole, out=out[whole:])


def _int32(n: int) -> int:
    return (n + 2**31) % 2**32 - 2**31


@leaf
def round_stochastically(values: Tensor, bits: Tensor, out: Tensor) -> None:
    """Round fp32 to bf16, up with the probability that makes it right on average.

    Args:
        values: [n] fp32, used up.
        bits: 16 random bits each. [n] int32, used up
        out: [n] bf16
    """
    rounded = bits.add_(values.view(torch.int32)).bitwise_right_shift_(16)
    out.view(torch.int16).copy_(rounded)
