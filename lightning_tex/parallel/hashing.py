"""Hashes that every machine and every layout computes alike: of names, and of indices to numbers in [0, 1)."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def stable_hash(*parts: object) -> int:
    """A 62-bit number that depends on the parts alone, on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def uniform(index: Tensor, key: int) -> Tensor:
    """Uniform on [0, 1) with 53 bits from (index, key)."""
    return _shift(scrambled(index, key), 11).to(torch.float64) * 2.0**-53


def scrambled(index: Tensor, key: int) -> Tensor:
    """64 bits from (index, key): the splitmix64 finaliser on int64 lanes, which wrap."""
    x = index * _signed(0x9E3779B97F4A7C15) + _signed(key)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(n: int) -> int:
    n &= (1 << 64) - 1
    return n - (1 << 64) if n >> 63 else n
