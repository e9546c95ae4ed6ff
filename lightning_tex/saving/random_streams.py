"""The random states of a rank as tensors."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lightning_tex.parallel.topology import Axis
from lightning_tex.saving.global_tensor import GlobalTensor, Part

# Where a checkpoint has them, beside weights and optimizer states.
RANDOM = "random"

# The global states are what user code draws from.
# NumPy and Python both use the Mersenne Twister: 624 words and a position, and a normal deviate kept for the next draw.


def random_streams() -> dict[str, Tensor]:
    """The states of torch (CPU and the current CUDA device), NumPy and Python, by name. [n] each."""
    streams = {"torch": torch.get_rng_state(), "numpy": _pack_numpy(), "python": _pack_python()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        streams["cuda"] = torch.cuda.get_rng_state()
    return streams


def restore_random_streams(streams: dict[str, Tensor]) -> None:
    """Continue from states that :func:`random_streams` gave; with none, nothing."""
    if not streams:
        return
    torch.set_rng_state(streams["torch"])
    _unpack_numpy(streams["numpy"].tolist())
    _unpack_python(streams["python"].tolist())
    if "cuda" in streams and torch.cuda.is_available():
        torch.cuda.set_rng_state(streams["cuda"])


def random_rows(streams: Mapping[str, Tensor], world: Axis) -> dict[str, GlobalTensor]:
    """Random states as global tensors [world, n], of which this rank holds its row."""
    return {
        name: GlobalTensor((world.size, len(row)), row.dtype, [Part.of((world.rank, 0), row[None])])
        for name, row in streams.items()
    }


def _pack_numpy() -> Tensor:
    state = np.random.get_state(legacy=False)  # noqa: NPY002
    assert isinstance(state, dict)
    words = state["state"]
    numbers = [*words["key"].tolist(), words["pos"], state["has_gauss"], _bits(state["gauss"])]
    return torch.tensor(numbers, dtype=torch.int64)


def _unpack_numpy(numbers: list[int]) -> None:
    *key, position, has_normal, normal = numbers
    words = np.array(key, dtype=np.uint32)
    np.random.set_state(("MT19937", words, position, has_normal, _number(normal)))  # noqa: NPY002


def _pack_python() -> Tensor:
    version, words, normal = random.getstate()
    kept = (0, 0) if normal is None else (1, _bits(normal))
    return torch.tensor([version, *words, *kept], dtype=torch.int64)


def _unpack_python(numbers: list[int]) -> None:
    version, *words, has_normal, normal = numbers
    random.setstate((version, tuple(words), _number(normal) if has_normal else None))


def _bits(number: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def _number(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])
