"""The shards of a stream: each is opened by itself, at any place that it was read up to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tex.data.corpus import Source
from lightning_tex.data.damage import json_object
from lightning_tex.data.local_files import builder_of, named_files
from lightning_tex.parallel.errors import UserValueError

if TYPE_CHECKING:
    import datasets

_AT_ONCE = 64  # rows

Place = Any  # in a shard, of plain values; None: its beginning
Row = Callable[[], Any]  # gives its text, which takes reading only then


class Shards(ABC):
    """Shards of documents, by their numbers.

    Attributes:
        count: of the shards.
    """

    count: int

    @abstractmethod
    def read(self, shard: int, place: Place = None) -> Iterator[tuple[Row, Place]]:
        """The rows of a shard from a place on, each with the place behind it."""

    @abstractmethod
    def name_of(self, shard: int) -> str:
        """A shard in the user's words."""


def required_text(row: Row, number: int, shard: str) -> str:
    """The text of a row.

    Args:
        row: gives it.
        number: of the row in its shard.
        shard: in the user's words.

    Raises:
        ValueError: it is no text.
    """
    text = row()
    if not isinstance(text, str):
        raise UserValueError(
            f"row {number} of {shard} is {text!r} and no text; legal: strings in every row (leave such rows out, or "
            "name another text_column)"
        )
    return text


class DatasetShards(Shards):
    """Those of a streamed data set, as ``datasets`` divides it; a place is its ``state_dict``.

    Args:
        documents: with a column ``text``.
        name: of the data set.
    """

    def __init__(self, documents: datasets.IterableDataset, name: str) -> None:
        self.documents, self.name = documents, name
        self.count = max(1, documents.num_shards)

    def read(self, shard: int, place: Place = None) -> Iterator[tuple[Row, Place]]:
        from datasets.distributed import split_dataset_by_node

        documents = split_dataset_by_node(self.documents, shard, self.count)
        state, done = place or (None, 0)
        if state is not None:
            documents.load_state_dict(state)
        # By batches, since a single row is divided once more in a worker of a DataLoader.
        for batch in documents.iter(batch_size=_AT_ONCE):
            texts = batch["text"]
            for number in range(done, len(texts)):
                yield partial(texts.__getitem__, number), (state, number + 1)
            state, done = documents.state_dict(), 0

    def name_of(self, shard: int) -> str:
        return f"shard {shard} of {self.count} of {self.name}"


class LineShards(Shards):
    """Local files with a JSON object a line; a place is an offset in bytes, and the lines before it.

    Args:
        files: in their order.
        column: that holds the text.
    """

    def __init__(self, files: list[Path], column: str) -> None:
        self.files, self.column = files, column
        self.count = len(files)

    def read(self, shard: int, place: Place = None) -> Iterator[tuple[Row, Place]]:
        offset, number = place or (0, 0)
        with self.files[shard].open("rb") as lines:
            lines.seek(offset)
            for line in lines:
                begin, offset, number = offset, offset + len(line), number + 1
                if line.strip():
                    yield partial(self._text, line, shard, number, begin), (offset, number)

    def _text(self, line: bytes, shard: int, number: int, begin: int) -> Any:
        where = f"{self.files[shard]}, line {number}"
        row = json_object(line, where, begin)
        if self.column not in row:
            raise UserValueError(f"{where} has no {self.column!r}; it has: {', '.join(row)}")
        return row[self.column]

    def name_of(self, shard: int) -> str:
        return str(self.files[shard])


def shards_of(source: Source, documents: datasets.IterableDataset) -> Shards:
    """The shards of a source's training documents.

    Args:
        source: what they are of.
        documents: with a column ``text``.
    """
    builder, data_files, _ = builder_of(str(source.path), source.data_files)
    if isinstance(data_files, dict):
        data_files = data_files.get(source.split)
    files = named_files(data_files)
    if builder == "json" and files and all(file.suffix == ".jsonl" for file in files):
        return LineShards(files, source.text_column)
    if builder == "parquet" and files and hasattr(documents, "reshard"):
        documents = documents.reshard()  # a shard for each group of rows, which is found without reading others
    return DatasetShards(documents, f"path={source.path!r}")
