"""NCCL's flight recorder: on for every run that communicates by NCCL, and written when a run stands still."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

import torch

_FILE = "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
_ENTRIES = "2000"


def record_flights(folder: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Let NCCL remember its collectives; before process groups exist. What the user has set stays.

    Args:
        folder: gets ``nccl_trace_rank_0`` and so on, which ``torchfrtrace`` reads.
    """
    environment.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", _ENTRIES)
    environment.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if _FILE not in environment:
        with suppress(OSError):  # nothing to be written to is no reason not to train
            folder.mkdir(parents=True, exist_ok=True)
        environment[_FILE] = str(folder.absolute() / "nccl_trace_rank_")


def write_flights(rank: int) -> None:
    """Write what NCCL remembers of this rank; nothing where there is no NCCL."""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    prefix = os.environ.get(_FILE)
    if dump is not None and prefix:
        with suppress(OSError, RuntimeError):
            Path(f"{prefix}{rank}").write_bytes(dump())
