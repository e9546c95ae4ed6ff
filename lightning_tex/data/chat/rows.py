"""Where fine-tuning data comes from: JSON lines as they are, or whatever ``load_dataset`` reads."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_tex.data.corpus import Source, fingerprint, held_out
from lightning_tex.data.damage import json_object
from lightning_tex.data.local_files import builder_of, file_stamps, named_files
from lightning_tex.parallel.errors import UserValueError

if TYPE_CHECKING:
    import datasets

Placed = tuple[str, dict[str, Any]]  # where a row is, in the user's words, and the row


class JsonLines:
    """Rows of files with a JSON object a line, which are read only where they are asked for.

    A row is what its line says: other readers give all rows the same keys, which a chat template would take for said.

    Args:
        files: in their order.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self._lines = [_lines(file) for file in self.files]
        self._firsts = np.cumsum([0, *(len(starts) for starts, _ in self._lines)])
        self.size = sum(file.stat().st_size for file in self.files)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def read(self, start: int, stop: int) -> list[Placed]:
        return [self._row(index) for index in range(start, stop)]

    def _row(self, index: int) -> Placed:
        which = bisect_right(self._firsts, index) - 1
        starts, numbers = self._lines[which]
        line = index - int(self._firsts[which])
        begin = int(starts[line])
        with self.files[which].open("rb") as opened:
            opened.seek(begin)
            content = opened.readline()
        place = f"{self.files[which]}, line {numbers[line]}"
        return place, json_object(content, place, begin)


def _lines(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Where each line begins that is not empty, and its number."""
    if file.stat().st_size == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    content = np.memmap(file, np.uint8, "r")
    at_once = 1 << 26
    ends = [np.flatnonzero(content[i : i + at_once] == ord("\n")) + i for i in range(0, len(content), at_once)]
    starts = np.concatenate([[0], *(end + 1 for end in ends)]).astype(np.int64)
    lengths = np.diff(starts, append=len(content) + 1) - 1
    first = content[np.minimum(starts, len(content) - 1)]
    filled = (lengths > 1) | ((lengths == 1) & (first != ord("\r")))
    return starts[filled], np.flatnonzero(filled) + 1


class DatasetRows:
    """Rows of a ``datasets`` object that lies on disk.

    Args:
        dataset: all of its columns are read.
        what: it is, for messages.
    """

    def __init__(self, dataset: datasets.Dataset, what: str) -> None:
        self.dataset, self.what = dataset, what
        self.size = dataset.data.nbytes * len(dataset) // max(1, dataset.data.num_rows)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, start: int, stop: int) -> list[Placed]:
        columns = self.dataset[start:stop]
        return [
            (f"{self.what}, row {start + i}", {name: values[i] for name, values in columns.items()})
            for i in range(stop - start)
        ]


class SomeRows:
    """Some rows of others, by their numbers.

    Args:
        rows: all.
        numbers: of those.
    """

    def __init__(self, rows: JsonLines, numbers: np.ndarray) -> None:
        self.rows, self.numbers = rows, numbers
        self.size = rows.size * len(numbers) // max(1, len(rows))

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, start: int, stop: int) -> list[Placed]:
        return [row for number in self.numbers[start:stop] for row in self.rows.read(number, number + 1)]


AnyRows = JsonLines | DatasetRows | SomeRows


@dataclass(frozen=True)
class ConversationSource(Source):
    """What to read, as a :class:`Source` has it, with all columns."""

    def select(self, documents: Any) -> Any:
        return documents

    def parts(self, cache_dir: Path, hub_cache_dir: Path | None) -> tuple[dict[str, AnyRows], str]:
        """Training, validation and, where there are any, test rows; and what changes when they do.

        Raises:
            ValueError: a file that cannot be read, or nothing to hold out.
            FileNotFoundError: there is no such file.
        """
        files = self._json_lines()
        if files is not None:
            return self._of_lines(files)
        documents = self.load(cache_dir, hub_cache_dir)
        named = {"train": documents.train, "validation": documents.validation, "test": documents.test}
        parts: dict[str, AnyRows] = {
            name: DatasetRows(part, f"{self.path}, {name}") for name, part in named.items() if part is not None
        }
        return parts, documents.key

    def _json_lines(self) -> dict[str, list[Path]] | None:
        """Files by split, where all are local ones of JSON lines."""
        with self.reading():
            builder, data_files, _ = builder_of(str(self.path), self.data_files)
        if builder != "json" or data_files is None:
            return None
        by_split = data_files if isinstance(data_files, dict) else {"train": data_files}
        files = {split: named_files(names) for split, names in by_split.items()}
        are_lines = all(file.suffix.lower() == ".jsonl" for split in files.values() for file in split)
        wanted = {self.split, self.validation_split or self.split, self.test_split or self.split}
        return files if all(files.values()) and are_lines and wanted <= files.keys() else None

    def _of_lines(self, files: dict[str, list[Path]]) -> tuple[dict[str, AnyRows], str]:
        key = fingerprint(file_stamps({split: list(map(str, names)) for split, names in files.items()}))
        train = JsonLines(files[self.split])
        parts: dict[str, AnyRows] = {"train": train}
        validation = self.validation_split or ("validation" if "validation" in files else None)
        if validation is not None:
            parts["validation"] = JsonLines(files[validation])
        elif len(train) > 1:
            chosen = np.array(held_out(len(train), self.validation_fraction))
            parts["train"] = SomeRows(train, np.setdiff1d(np.arange(len(train)), chosen))
            parts["validation"] = SomeRows(train, chosen)
        else:
            names = ", ".join(map(str, files[self.split]))
            raise UserValueError(f"{names}: {len(train)} rows leave nothing to hold out for validation; legal: 2")
        if self.test_split:
            parts["test"] = JsonLines(files[self.test_split])
        return parts, key
