"""Every ordered pair of nine layouts: the same weights and states, the same samples next, the same next loss.

Two pairs by default, one from eight ranks with ``-m full``, all of them with ``pytest -m faults``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from helpers.cases import case
from helpers.checkpoint_runs import EPOCH, fit, tensors

from lightning_tex.testing.ranks import run_ranks

# world, strategy
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tensor 2": (2, {"tensor_parallel_size": 2, "tile_size": 256}),
    "expert 2": (2, {"expert_parallel_size": 2, "zero_stage": 2}),
    "TED 2x2": (4, {"tensor_parallel_size": 2, "expert_parallel_size": 2}),
    "folding": (4, {"tensor_parallel_size": 2, "expert_tensor_parallel_size": 1, "expert_parallel_size": 4}),
    "data 4": (4, {"expert_parallel_size": 1, "zero_stage": 0}),
    "TED 2x4": (8, {"tensor_parallel_size": 2, "expert_parallel_size": 4}),
    "tensor 4 x 2": (8, {"tensor_parallel_size": 4, "expert_parallel_size": 2, "zero_stage": 2}),
    "expert 4 x 2": (8, {"expert_parallel_size": 4, "tile_size": 64}),
}
NAMES = list(LAYOUTS)
FEW = [("TED 2x2", "expert 2"), ("one", "tensor 2")]
FROM_EIGHT = [("TED 2x4", "expert 2")]
PAIRS = [(a, b) for a in NAMES for b in NAMES]


class FirstStep(L.Callback):
    """Saves before the first step, and keeps what that step is on."""

    def __init__(self, save: str) -> None:
        self.save, self.rows = save, []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.save)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        rows = batch[0].tolist()
        every: list[Any] = [rows]
        if dist.is_initialized():
            every = [None] * dist.get_world_size()
            dist.all_gather_object(every, rows)
        self.rows = sorted({tuple(row) for own in every for row in own})


def saves(folder: str, names: list[str]) -> None:
    for name in names:
        world, layout = LAYOUTS[name]
        fit(layout, world, 1, save=f"{folder}/{name}.ckpt")


def resumes(folder: str, pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    found = []
    for source, target in pairs:
        with case(source, target):
            world, layout = LAYOUTS[target]
            first = FirstStep(f"{folder}/{source} on {target}.ckpt")
            options = {"callbacks": [first], "max_steps": EPOCH + 1, "model": {"seed": 4}}
            result = fit(layout, world, 2, f"{folder}/{source}.ckpt", **options)
            found.append({"losses": result["losses"], "rows": first.rows})
    return found


def hold(folder: Path, pairs: list[tuple[str, str]]) -> None:
    sources = {source for source, _ in pairs}
    worlds = sorted({LAYOUTS[name][0] for name in sources})
    for world in worlds:
        run_ranks(world, saves, str(folder), [n for n in sources if LAYOUTS[n][0] == world], detail=False)
    outcomes: dict[tuple[str, str], dict[str, Any]] = {}
    # A checkpoint's next step is that of the layout which saved it.
    pairs = list(dict.fromkeys([*pairs, *((name, name) for name in sources)]))
    for layout in dict.fromkeys(target for _, target in pairs):
        own = [pair for pair in pairs if pair[1] == layout]
        found = run_ranks(LAYOUTS[layout][0], resumes, str(folder), own, detail=False, timeout=300)[0]
        outcomes |= dict(zip(own, found, strict=True))
    for (source, target), outcome in outcomes.items():
        with case(source, target):
            expected = outcomes[source, source]
            assert outcome["rows"] == expected["rows"]
            assert len(outcome["rows"]) == 8
            assert outcome["losses"] == pytest.approx(expected["losses"], rel=1e-6)
            assert len(outcome["losses"]) == 1
            saved, again = tensors(folder / f"{source}.ckpt"), tensors(folder / f"{source} on {target}.ckpt")
            assert saved.keys() == again.keys()
            assert all(torch.equal(saved[name], again[name]) for name in saved)


@pytest.mark.parametrize(
    "pairs", [FEW, pytest.param(FROM_EIGHT, marks=pytest.mark.full)], ids=["up to four ranks", "from eight ranks"]
)
def test_a_few_pairs_of_layouts(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    hold(tmp_path, pairs)


@pytest.mark.faults
def test_every_pair_of_layouts(tmp_path: Path) -> None:
    hold(tmp_path, PAIRS)
    print(f"{len(PAIRS)} ordered pairs of {len(NAMES)} layouts")
