"""A stream of several files, and its data module on data ranks that are pretended in one process."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_tex.data import TextDataModule
from lightning_tex.data.order import Share
from lightning_tex.data.packing import Batch
from lightning_tex.data.streams import stream

G = 8


@pytest.fixture(scope="session")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of JSON lines, one of which is short."""
    root = tmp_path_factory.mktemp("stream")
    for file, count in enumerate((50, 9, 70)):
        write_lines(root / f"{file}.jsonl", [f"<{file}-{i}> " + "word " * (3 + i % 9) for i in range(count)])
    return root


def write_lines(file: Path, texts: list[Any], column: str = "text") -> None:
    file.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))


class Ranks:
    """The data module of each rank of a data axis."""

    def __init__(self, path: Path, cache: Path) -> None:
        self.path, self.cache = path, cache

    def module(self, rank: int = 0, ranks: int = 1, **options: Any) -> TextDataModule:
        usual: dict[str, Any] = {"vocab_size": 300, "sequence_length": 16, "global_batch_size": G, "streaming": True}
        usual |= {"stream_parts": 8, "shuffle_buffer": 7, "cache_dir": str(self.cache)}
        data = TextDataModule(str(self.path), **(usual | options))
        data._share = functools.partial(Share, G, ranks, rank)  # type: ignore[method-assign]
        return data

    def read(self, count: int, ranks: int = 1, state: Any = None, **options: Any) -> tuple[list[Batch], Any]:
        """So many global batches from a state on, and the state then."""
        modules = [self.module(rank, ranks, **options) for rank in range(ranks)]
        if state is not None:
            for module in modules:
                module.load_state_dict(state)
        with ExitStack() as stack:
            iterators = [stack.enter_context(closing(iter(module.train_dataloader()))) for module in modules]
            steps = [[next(iterator) for iterator in iterators] for _ in range(count)]
            state = gathered(modules)
        return [{name: torch.cat([part[name] for part in parts]) for name in parts[0]} for parts in steps], state


def gathered(modules: list[TextDataModule]) -> Any:
    """The state of a rank, with what ranks would tell each other."""
    streams: list[Any] = [module._in_parts() for module in modules]
    steps = [module._cursor.position()[1] for module in modules]  # type: ignore[union-attr]
    every = [one.positions.before(step) for one, step in zip(streams, steps, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_of_all_ranks", lambda own, trainer: every)
        states = [module.state_dict() for module in modules]
    assert all(state == states[0] for state in states)
    return states[0]


@pytest.fixture
def ranks_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Ranks]:
    """Makes the ranks that read a folder."""
    return lambda path: Ranks(path, tmp_path_factory.getbasetemp() / "stream cache")


@pytest.fixture
def ranks(ranks_of: Any, lines: Path) -> Ranks:
    return ranks_of(lines)
