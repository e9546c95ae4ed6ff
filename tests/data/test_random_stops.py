"""Runs stopped or killed anywhere, twenty times, that go on on another data axis: no sample lost or repeated."""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import random
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cases import case
from helpers.chats import sums, write_lines, write_tokenizer
from helpers.ranks import on_ranks
from helpers.restarted_run import Killed
from helpers.trainers import quiet
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_tex import TexMoEStrategy
from lightning_tex.data import FineTuningDataModule, MixtureDataModule, TextDataModule, TextSource, TokenDataModule
from lightning_tex.data.order import Share
from lightning_tex.testing.ranks import RanksFailed

G, STOPS, STEPS = 8, 20, 60
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork.. may lead to deadlocks:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stops")
    (root / "text").mkdir()
    (root / "rows of text").mkdir()
    for i in range(60):
        (root / "text" / f"{i:02d}.txt").write_text(f"text number {i} says {i * i} " * (3 + i % 5))
    for i, count in enumerate((30, 9, 50, 21)):
        rows = [{"text": f"row {i}.{j} " * (3 + j % 5)} for j in range(count)]
        write_lines(root / "rows of text" / f"{i}.jsonl", rows)
    write_lines(root / "rows.jsonl", sums(200))
    write_tokenizer(root / "tokenizer")
    return root


def made(place: Path, kind: str, workers: int) -> TokenDataModule:
    usual: dict[str, Any] = {"global_batch_size": G, "cache_dir": str(place / "cache"), "num_workers": workers}
    usual |= {"num_proc": 1, "tokenizer": str(place / "tokenizer")}
    if kind == "text":
        return TextDataModule(str(place / "text"), sequence_length=16, document_mask=True, **usual)
    if kind == "stream":
        parts: dict[str, Any] = {"streaming": True, "stream_parts": 8, "shuffle_buffer": 5}
        return TextDataModule(str(place / "rows of text"), sequence_length=16, document_mask=True, **parts, **usual)
    if kind == "mixture":
        sources = {"a": TextSource(str(place / "text"), weight={0: 1, 99: 7}), "b": TextSource(str(other_files(place)))}
        return MixtureDataModule(sources, sequence_length=16, **usual)
    return FineTuningDataModule(str(place / "rows.jsonl"), packing=kind == "packed", sequence_length=96, **usual)


def other_files(place: Path) -> Path:
    """A second source, of the first one's files."""
    other = place / "other"
    if not other.exists():
        other.mkdir()
        for i in range(9):
            (other / f"{i}.txt").write_text((place / "text" / f"{i:02d}.txt").read_text() * 2)
    return other


def read(make: Callable[[], TokenDataModule], state: Any, ranks: int, most: int) -> tuple[list[list[int]], Any]:
    """Up to so many global batches of the epoch that a state stands in, and the state then."""
    modules = [make() for _ in range(ranks)]
    for rank, module in enumerate(modules):
        module._share = functools.partial(Share, G, ranks, rank)  # type: ignore[method-assign]
        if state is not None:
            module.load_state_dict(state)
    iterators = [iter(module.train_dataloader()) for module in modules]
    batches = []
    for _ in range(most):
        parts = [next(iterator, None) for iterator in iterators]
        if parts[0] is None:
            break
        batches.append(list(chain(*(part["sample"].tolist() for part in parts))))  # type: ignore[index]
    states = [module.state_dict() for module in modules]
    assert all(one == states[0] for one in states)
    return batches, states[0]


@pytest.mark.parametrize(
    "workers", [0, pytest.param(2, marks=pytest.mark.full), pytest.param(4, marks=pytest.mark.full)]
)
@pytest.mark.parametrize("kind", ["text", "packed", "padded", "mixture"])
def test_twenty_stops_on_changing_axes(place: Path, kind: str, workers: int) -> None:
    make, draw = functools.partial(made, place, kind, workers), random.Random(kind)
    undisturbed: list[list[int]] = []
    state = None
    while len(undisturbed) < 60:
        batches, state = read(make, state, 1, 60 - len(undisturbed))
        assert batches
        undisturbed += batches
    seen: list[list[int]] = []
    state = None
    for stop in range(STOPS):
        ranks, most = draw.choice([1, 2, 4, 8]), draw.randint(0, 4)
        with case(stop=stop, ranks=ranks, most=most, at=len(seen)):
            batches, state = read(make, state, ranks, most)
            seen += batches
            assert seen == undisturbed[: len(seen)]
    assert len(seen) > 20


def global_batches(place: Path, kind: str, workers: int, ranks: int, most: int) -> list[dict[str, Tensor]]:
    modules = [made(place, kind, workers) for _ in range(ranks)]
    for rank, module in enumerate(modules):
        module._share = functools.partial(Share, G, ranks, rank)  # type: ignore[method-assign]
    with ExitStack() as stack:
        iterators = [stack.enter_context(closing(iter(module.train_dataloader()))) for module in modules]  # type: ignore[type-var]
        steps = [[next(iterator) for iterator in iterators] for _ in range(most)]
    return [{name: torch.cat([part[name] for part in parts]) for name in parts[0]} for parts in steps]


@pytest.mark.full
@pytest.mark.parametrize("workers", [0, 2, 4])
@pytest.mark.parametrize("kind", ["text", "packed", "mixture", "stream"])
def test_batches_on_every_data_axis_with_any_workers(place: Path, kind: str, workers: int) -> None:
    """To the bit, of those that one process reads itself."""
    alone = global_batches(place, kind, 0, 1, 12)
    for ranks in (1, 2, 4, 8):
        with case(ranks=ranks):
            for step, (batch, expected) in enumerate(
                zip(global_batches(place, kind, workers, ranks, 12), alone, strict=True)
            ):
                assert batch.keys() == expected.keys()
                assert all(torch.equal(batch[name], expected[name]) for name in expected), step


@pytest.mark.parametrize("kind", ["text", "mixture", "stream"])
def test_an_iteration_that_ends_early_leaves_no_worker(place: Path, kind: str) -> None:
    iterator = iter(made(place, kind, 2).train_dataloader())
    next(iterator)
    assert len(multiprocessing.active_children()) == 2
    iterator.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


# --- processes that are killed


class Noted:
    """Says in a file what each step of this rank was given, as soon as it is."""

    def __init__(self, file: Path) -> None:
        self.file = file.open("a", buffering=1)

    def __call__(self, step: int, batch: dict[str, Tensor]) -> None:
        tensors = [values.tolist() for name, values in sorted(batch.items()) if name != "sample"]
        rows = [hashlib.blake2b(str(row).encode(), digest_size=8).hexdigest() for row in zip(*tensors, strict=True)]
        print(json.dumps([step, batch["sample"].tolist(), rows]), file=self.file)


def train(make: Callable[[], TokenDataModule], module: Any, folder: Path, attempt: int, kills: int) -> None:
    """A fit that saves after every step and goes on from the newest checkpoint, in which a rank may be killed."""
    trained, noted = module.training_step, Noted(folder / f"{attempt}.{os.environ['RANK']}")

    def training_step(batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        noted(module.trainer.global_step, batch)
        return trained(batch, batch_idx)

    module.training_step = training_step
    newest = {"monitor": "step", "mode": "max", "save_top_k": 2}
    saves = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=1, **newest)
    trainer = quiet(
        devices=int(os.environ["WORLD_SIZE"]), strategy=TexMoEStrategy(), max_steps=STEPS, max_epochs=99,
        limit_val_batches=0, callbacks=[saves, Killed(kills, 7, str(folder))],
    )  # fmt: skip
    trainer.fit(module, datamodule=make(), ckpt_path="auto")


def notes(folder: Path, attempt: int, ranks: int) -> dict[int, list[Any]]:
    """By step, what each rank was given; None: it was killed before."""
    steps: dict[int, list[Any]] = {}
    for rank in range(ranks):
        for line in (folder / f"{attempt}.{rank}").read_text().splitlines():
            step, samples, rows = json.loads(line)
            steps.setdefault(step, [None] * ranks)[rank] = list(zip(samples, rows, strict=True))
    return steps


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["text", "packed", "mixture", "stream"])
def test_twenty_kills_on_changing_axes(place: Path, kind: str, recorder: Any, tmp_path: Path) -> None:
    """Each by SIGKILL of a rank within its first three steps, with 0, 2 or 4 workers, on 1, 2, 4 or 8 data ranks."""
    draw = random.Random(kind)
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "killed"
    for made_here in (undisturbed, folder):
        made_here.mkdir()
    on_ranks(1, train, functools.partial(made, place, kind, 0), recorder(), undisturbed, 0, 0)
    whole = {step: found[0] for step, found in notes(undisturbed, 0, 1).items()}
    assert sorted(whole) == list(range(STEPS))
    kept: dict[int, Any] = {}  # what the weights were trained on that the next attempt goes on from
    for attempt in range(STOPS):
        ranks, workers = draw.choice([1, 2, 4, 8]), draw.choice([0, 2, 4])
        with case(attempt=attempt, ranks=ranks, workers=workers):
            make = functools.partial(made, place, kind, workers)
            with pytest.raises(RanksFailed, match="ended without a result") as killed:
                on_ranks(ranks, train, make, recorder(), folder, attempt, STOPS)
            assert not killed.value.hung
            given = notes(folder, attempt, ranks)
            for step, shares in given.items():
                for rank, share in enumerate(shares):
                    assert share is None or share == whole[step][rank * G // ranks : (rank + 1) * G // ranks]
            first = min(given, default=len(kept))
            assert first <= len(kept)
            kept = {step: rows for step, rows in kept.items() if step < first} | {
                step: list(chain(*shares)) for step, shares in given.items() if None not in shares
            }
    assert len(kept) > STOPS / 2
    identities = Counter(row for rows in kept.values() for row in rows)
    assert identities == Counter(row for step in range(len(kept)) for row in whole[step])
