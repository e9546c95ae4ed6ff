"""kill -9 of a rank anywhere, inside a save too: the newest complete checkpoint goes on as if nothing had happened.

One seeded point by default; fifty of them with ``pytest -m faults``.
"""

from __future__ import annotations

import os
import random
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.checkpoint_runs import EPOCH, fit
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_tex.saving import latest, paths
from lightning_tex.testing.ranks import run_ranks

# A run that is killed leaves a folder that is not empty.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

TED = {"tensor_parallel_size": 2, "expert_parallel_size": 2, "tile_size": 256}
RANDOM = {"dropout": 0.1, "noise": True}
STEPS = 3 * EPOCH


class Events:
    """Counts what this rank does to the disk below a folder, and ends it at one of these events or training steps.

    Args:
        folder: of the checkpoints.
        event: which one to end at, from 1; 0: none.
    """

    def __init__(self, folder: str, event: int = 0) -> None:
        self.folder, self.event, self.seen = folder, event, []
        sys.addaudithook(self._audit)
        os.fsync = self._before("fsync", os.fsync)
        torch.save = self._before("write", torch.save)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir"):
            paths = [str(a) for a in arguments[:2] if isinstance(a, (str, Path))]
            if any(path.startswith(self.folder) for path in paths):
                self._happens(f"{event} {Path(paths[0]).name}")

    def _before(self, name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self._happens(name)
            return act(*arguments, **options)

        return counted

    def _happens(self, what: str) -> None:
        self.seen.append(what)
        if len(self.seen) == self.event:
            os.kill(os.getpid(), signal.SIGKILL)


class EndsAtStep(L.Callback):
    """Ends this rank at the begin of a training step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: str, rank: int = -1, event: int = 0, step: int = -1, resume: bool = False) -> dict[str, Any]:
    """A fit of STEPS steps with a checkpoint after every second one and ``last.ckpt``; perhaps ended by force."""
    own = int(os.environ["RANK"]) == rank
    events = Events(folder, event if own else 0)
    newest = latest(folder) if resume else None
    begun = paths.manifest_of(newest).step if newest else 0
    newest_two = {"monitor": "step", "mode": "max", "save_top_k": 2}
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_last=True, **newest_two)
    callbacks = [saves, EndsAtStep(step if own else -1)]
    path = str(newest) if newest else None
    result = fit(TED, 4, STEPS // EPOCH, path, model=RANDOM, callbacks=callbacks, seed=6 if newest else 5)
    return {**result, "events": events.seen, "from": begun}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(4, train, str(tmp_path_factory.mktemp("undisturbed")), detail=False)


def points(undisturbed: list[dict[str, Any]], count: int, seed: int) -> list[dict[str, int]]:
    """Where to kill: three of five times within a save, at an event of each kind in turn; else at a step."""
    draw = random.Random(seed)
    kinds: dict[str, list[tuple[int, int]]] = {}
    for rank, events in enumerate(own["events"] for own in undisturbed):
        for number, event in enumerate(events, start=1):
            # Names of hidden versions are random.
            kinds.setdefault(re.sub(rf"\.{paths.TOKEN}|__\d|=\d+", "", event), []).append((rank, number))
    order = draw.sample(sorted(kinds), len(kinds))
    chosen = []
    for index in range(count):
        rank, event = draw.choice(kinds[order[index % len(order)]])
        step = {"rank": draw.randrange(4), "step": draw.randrange(1, STEPS)}
        chosen.append({"rank": rank, "event": event} if index % 5 < 3 else step)
    return chosen


def killed_and_resumed(folder: Path, undisturbed: list[dict[str, Any]], point: dict[str, int]) -> int:
    with pytest.raises(AssertionError, match="ended without a result"):
        run_ranks(4, _killed, str(folder), point, detail=False, timeout=60)
    resumed = run_ranks(4, _resumed, str(folder), detail=False)
    for own, whole in zip(resumed, undisturbed, strict=True):
        assert own["losses"] == whole["losses"][own["from"] :]
        assert torch.equal(own["own"], whole["own"])
        assert own["seen"] == STEPS
    names = {entry.name for entry in folder.iterdir()}
    hidden = {name for name in names if name.startswith(".")}
    assert hidden == {(folder / "last.ckpt").resolve().name}, "what the killed run left behind is still there"
    return int(resumed[0]["from"])


def _killed(folder: str, point: dict[str, int]) -> Any:
    return train(folder, **point)


def _resumed(folder: str) -> Any:
    return train(folder, resume=True)


def test_the_undisturbed_run_saves_where_points_are_drawn(undisturbed: list[dict[str, Any]]) -> None:
    first = undisturbed[0]["events"]
    assert sum(event.startswith("os.rename") for event in first) >= STEPS - 1
    assert {"write", "fsync", "open manifest.json", "open __0_0.distcp", "os.symlink"} <= {
        event if " " not in event or event.startswith("open") else event.split()[0] for event in first
    }
    assert all("write" in rank["events"] for rank in undisturbed)


@pytest.mark.parametrize("index", range(1))
def test_killed_and_resumed(tmp_path: Path, undisturbed: list[dict[str, Any]], index: int) -> None:
    killed_and_resumed(tmp_path, undisturbed, points(undisturbed, 5, seed=1)[index + 1])


@pytest.mark.faults
@pytest.mark.parametrize("index", range(50))
def test_killed_at_fifty_points(tmp_path: Path, undisturbed: list[dict[str, Any]], index: int) -> None:
    point = points(undisturbed, 50, seed=2026)[index]
    begun = killed_and_resumed(tmp_path, undisturbed, point)
    print(f"{point} -> resumed from step {begun}")
