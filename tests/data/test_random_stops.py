"""Runs that are stopped anywhere, twenty times, and go on on another data axis: no sample lost or repeated."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from helpers.cases import case
from helpers.chats import sums, write_lines, write_tokenizer

from lightning_tex.data import FineTuningDataModule, MixtureDataModule, TextDataModule, TextSource, TokenDataModule
from lightning_tex.data.order import Share

G, STOPS = 8, 20
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.. may lead to deadlocks:DeprecationWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stops")
    (root / "text").mkdir()
    for i in range(60):
        (root / "text" / f"{i:02d}.txt").write_text(f"text number {i} says {i * i} " * (3 + i % 5))
    write_lines(root / "rows.jsonl", sums(200))
    write_tokenizer(root / "tokenizer")
    return root


def made(place: Path, kind: str, workers: int) -> TokenDataModule:
    usual: dict[str, Any] = {"global_batch_size": G, "cache_dir": str(place / "cache"), "num_workers": workers}
    usual |= {"num_proc": 1, "tokenizer": str(place / "tokenizer")}
    if kind == "text":
        return TextDataModule(str(place / "text"), sequence_length=16, document_mask=True, **usual)
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
