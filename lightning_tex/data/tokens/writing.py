"""Rows to token shards: divided into jobs that do not depend on who does them, encoded, and written."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lightning_tex.data.tokens.progress import Progress
from lightning_tex.data.tokens.store import list_shards, shard_path, write_shard
from lightning_tex.data.tokens.together import Job, Told, build_together, draft_of

_JOB_BYTES = 4_000_000
_FEW_JOBS, _LARGE_JOB = 64, 32_000_000  # of a part: more data has larger jobs first, and then more of them,
_MOST_JOBS = 1024  # at most so many, that the list of their shards stays short
_AT_ONCE = 256  # rows


class Rows(Protocol):
    """What is encoded: any number of rows, read at any place by any process."""

    size: int  # bytes, about

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Any:
        """Rows ``[start, stop)``, as their encoder takes them."""


@dataclass
class Encoded:
    """Documents as tokens.

    Args:
        documents: the tokens of each.
        trained: by document, which tokens are to be predicted; None: all.
        counts: of what was found, by name.
    """

    documents: list[np.ndarray]
    trained: list[np.ndarray] | None = None
    counts: Counter[str] = field(default_factory=Counter)


class Encoder(Protocol):
    """Makes tokens of rows; the same ones in every process."""

    dtype: np.dtype

    def encode(self, rows: Any, first: int) -> Encoded:
        """The documents of some rows, of which ``first`` is the number of the first."""


def available_processors() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0))


def write_tokens(
    folder: Path,
    parts: Mapping[str, Rows],
    encoder: Encoder,
    processes: int | None,
    finish: Callable[[Path, Mapping[str, list[dict]]], None] = lambda *_: None,
) -> Path:
    """Write a folder with one of shards for each part, alone or with others that do so at the same time.

    Args:
        folder: is made; nothing is done where it is.
        parts: rows by name.
        encoder: makes tokens of them.
        processes: of this machine; None: as many as it has processors for this process.
        finish: is called with the folder and the facts of all shards, before it appears.
    """
    if folder.exists():
        return folder
    by_part = {name: _jobs(name, rows, encoder) for name, rows in parts.items()}
    jobs = [job for part in by_part.values() for job in part]

    def complete(draft: Path) -> None:
        for name in parts:
            (draft / name).mkdir(exist_ok=True)
        finish(draft, {name: list_shards(draft / name, len(part)) for name, part in by_part.items()})

    left = sum(job.rows for job in jobs if not (draft_of(folder) / job.mark).exists())
    with Progress(left) as progress:
        return build_together(folder, jobs, complete, processes or available_processors(), progress)


def _jobs(part: str, rows: Rows, encoder: Encoder) -> list[Job]:
    job_bytes = max(_JOB_BYTES, min(rows.size / _FEW_JOBS, _LARGE_JOB), rows.size / _MOST_JOBS)
    step = max(1, int(len(rows) * job_bytes / max(1, rows.size)))
    jobs = []
    for number, start in enumerate(range(0, len(rows), step)):
        stop = min(start + step, len(rows))
        mark = shard_path(Path(part), number).with_suffix(".json")
        jobs.append(Job(mark, partial(_write, rows, encoder, start, stop), stop - start))
    return jobs


def _write(rows: Rows, encoder: Encoder, start: int, stop: int, mark: Path, told: Told) -> None:
    documents: list[np.ndarray] = []
    trained: list[np.ndarray] | None = []
    counts: Counter[str] = Counter()
    for first in range(start, stop, _AT_ONCE):
        last = min(first + _AT_ONCE, stop)
        encoded = encoder.encode(rows.read(first, last), first)
        documents += encoded.documents
        trained = None if encoded.trained is None else (trained or []) + encoded.trained
        counts += encoded.counts
        told(sum(map(len, encoded.documents)), last - first)
    lengths = np.array([len(document) for document in documents], np.int64)
    tokens = np.concatenate([np.empty(0, encoder.dtype), *documents])
    mask = None if trained is None else np.concatenate([np.empty(0, np.uint8), *trained])
    write_shard(mark, tokens, lengths, mask, {"counts": counts})
