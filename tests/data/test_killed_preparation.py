"""Preparations killed at any moment, and runs that prepare the same at once: the tokens of an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.chats import sums, write_lines, write_tokenizer

from lightning_tex.data import FineTuningDataModule, TextDataModule, TokenDataModule
from lightning_tex.data.tokens import writing
from lightning_tex.data.tokens.together import Job

KILLS = 10
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.. may lead to deadlocks:DeprecationWarning")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of data that takes many jobs, each of some milliseconds."""
    monkeypatch.setattr(writing, "_JOB_BYTES", 2_000)
    monkeypatch.setattr(writing, "_FEW_JOBS", 10_000)
    monkeypatch.setattr(writing, "Job", SlowJob)
    write_tokenizer(tmp_path / "tokenizer")
    write_lines(tmp_path / "text.jsonl", [{"text": f"text {i} says {i * i} " * 9} for i in range(400)])
    write_lines(tmp_path / "chats.jsonl", sums(400))
    return tmp_path


class SlowJob(Job):
    def __init__(self, mark: Path, do: Any, rows: int) -> None:
        def slowly(place: Path, told: Any) -> None:
            time.sleep(0.02)
            do(place, told)

        super().__init__(mark, slowly, rows)


def module(place: Path, kind: str, cache: str) -> TokenDataModule:
    usual: dict[str, Any] = {"tokenizer": str(place / "tokenizer"), "cache_dir": str(place / cache), "num_proc": 2}
    if kind == "text":
        return TextDataModule(str(place / "text.jsonl"), sequence_length=16, **usual)
    return FineTuningDataModule(str(place / "chats.jsonl"), sequence_length=96, **usual)


def forked(place: Path, kind: str) -> int:
    """A process, and a session of its own, that prepares."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            module(place, kind, "disturbed").prepare_data()
        finally:
            os._exit(0)
    return pid


@pytest.mark.faults
@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("kind", ["text", "chats"])
def test_killed_ten_times(place: Path, kind: str, runs: int) -> None:
    """With all of its processes, or alone, so that those it has forked have to notice."""
    undisturbed, draw = module(place, kind, "undisturbed").prepared, random.Random(kind)
    unfinished = 0
    for _ in range(KILLS):
        pids = [forked(place, kind) for _ in range(runs)]
        time.sleep(draw.uniform(0.05, 0.5))
        for pid in pids:
            (os.killpg if draw.random() < 0.5 else os.kill)(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        unfinished += not (place / "disturbed" / "notes").exists()
    data = module(place, kind, "disturbed")
    assert data.prepared.fingerprint == undisturbed.fingerprint
    parts = [sorted(path.relative_to(place / name).parts[-2:] for path in files_of(place / name)) for name in CACHES]
    assert parts[0] == parts[1]
    assert unfinished > 0


CACHES = ("undisturbed", "disturbed")


def files_of(cache: Path) -> list[Path]:
    found = [path for path in cache.rglob("*.json") if path.stem.isdigit()]
    assert all(json.loads(path.read_text())["documents"] for path in found)
    return found
