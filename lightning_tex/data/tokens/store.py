"""A stream of tokens in mapped files: opened without being read, and read at any place."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from lightning_tex.parallel.errors import UserFileError, UserValueError

_READ_AT_ONCE = 1 << 22  # tokens
_MOST_OPEN = 128  # files
DRAFT = ".draft"  # ends the name of a file that is being written


class TokenFile:
    """Tokens of consecutive documents in one file, mapped when they are asked for.

    Args:
        path: of the tokens, one behind the other.
        dtype: of a token.
        tokens: their number.
        documents: how many they are of.
        loss: a file of one byte a token, 0 where it is not to be predicted; None: all are.
        remedy: what to do about a file that is damaged.
    """

    def __init__(
        self, path: Path, dtype: np.dtype, tokens: int, documents: int, loss: Path | None = None, remedy: str = ""
    ) -> None:
        self.path, self.dtype, self.tokens, self.documents = path, dtype, tokens, documents
        self.loss, self.remedy = loss, remedy
        self._maps: dict[Path, np.ndarray] = {}

    @property
    def data(self) -> np.ndarray:
        """[tokens], mapped."""
        return self._mapped(self.path, self.dtype, self.tokens)

    @property
    def trained(self) -> np.ndarray | None:
        """[tokens] bytes, mapped: 0 where a token is not to be predicted."""
        return None if self.loss is None else self._mapped(self.loss, np.dtype(np.uint8), self.tokens)

    @property
    def ends(self) -> np.ndarray:
        """[documents], where each ends: the tokens of the file up to there."""
        return self._mapped(self.path.with_suffix(".ends"), np.dtype("<i8"), self.documents)

    def document_end(self, number: int) -> int:
        """Where one of the documents ends."""
        return int(self.ends[number])

    def close(self) -> None:
        """Let go of what is mapped, which is mapped again when it is asked for."""
        self._maps.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Without what is mapped, which every process maps for itself."""
        return {**vars(self), "_maps": {}}

    def _mapped(self, path: Path, dtype: np.dtype, count: int) -> np.ndarray:
        if path not in self._maps:
            if not path.is_file():
                raise UserFileError(f"{path} is gone; {self.remedy}")
            there, expected = path.stat().st_size, count * dtype.itemsize
            if there != expected:
                raise UserValueError(f"{path} has {there} bytes and was written with {expected}; {self.remedy}")
            self._maps[path] = np.memmap(path, dtype, "r", shape=(count,)) if count else np.empty(0, dtype)
        return self._maps[path]


class Tokens:
    """A stream of tokens, in one file or in several one behind the other.

    Args:
        files: in their order.
        start: of the stream, counted in the files' tokens.
        stop: its end; None: that of the last file.
    """

    def __init__(self, files: Sequence[TokenFile], start: int = 0, stop: int | None = None) -> None:
        self.files = list(files)
        self._starts = [0]
        for file in self.files:
            self._starts.append(self._starts[-1] + file.tokens)
        self._first, self._last = start, self._starts[-1] if stop is None else stop
        self._used: OrderedDict[int, None] = OrderedDict()  # files by number, the one used last at the end

    def __len__(self) -> int:
        return self._last - self._first

    @property
    def documents(self) -> int:
        """Their number."""
        whole = len(self) == self._starts[-1]
        return sum(file.documents for file in self.files) if whole else len(self.ends())

    @property
    def says_what_is_trained(self) -> bool:
        """Whether some tokens may not be to be predicted."""
        return any(file.loss is not None for file in self.files)

    def divided(self, documents: int) -> tuple[Tokens, Tokens]:
        """Two streams, of the first documents and of all others."""
        end, left = 0, documents
        for file, start in zip(self.files, self._starts, strict=False):
            end = start + (file.document_end(left - 1) if 0 < left <= file.documents else min(left, 1) * file.tokens)
            left -= file.documents
            if left <= 0:
                break
        return Tokens(self.files, 0, end), Tokens(self.files, end)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``[start, stop)``: a view of a mapped file, or a copy where they lie in several."""
        return _joined([file.data[a:b] for file, a, b in self._pieces(start, stop)], self._dtype)

    def trained(self, start: int, stop: int) -> np.ndarray:
        """Which of the tokens ``[start, stop)`` are to be predicted, as bytes."""
        pieces = [
            np.ones(b - a, np.uint8) if file.trained is None else file.trained[a:b]
            for file, a, b in self._pieces(start, stop)
        ]
        return _joined(pieces, np.dtype(np.uint8))

    def ends(self) -> np.ndarray:
        """[documents] int64, where each document ends in the stream."""
        parts = [file.ends + start for file, start in zip(self.files, self._starts[:-1], strict=True)]
        ends = np.concatenate([np.empty(0, np.int64), *parts])
        first = np.searchsorted(ends, self._first, side="right") if self._first else 0
        return ends[first : np.searchsorted(ends, self._last, side="right")] - self._first

    def pieces(self) -> Iterator[np.ndarray]:
        """All tokens in their order, some at a time."""
        for start in range(0, len(self), _READ_AT_ONCE):
            yield self.read(start, min(start + _READ_AT_ONCE, len(self)))

    def file_of(self, token: int) -> Path:
        """The file that a token of the stream is in."""
        return self.files[self._index(self._first + token)].path

    @property
    def _dtype(self) -> np.dtype:
        return self.files[0].dtype if self.files else np.dtype("<u2")

    def _index(self, token: int) -> int:
        return min(bisect_right(self._starts, token) - 1, len(self.files) - 1)

    def _use(self, number: int) -> None:
        """Let go of the file that was used longest ago: a process may only have so many open."""
        self._used[number] = None
        self._used.move_to_end(number)
        if len(self._used) > _MOST_OPEN:
            oldest, _ = self._used.popitem(last=False)
            self.files[oldest].close()

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[TokenFile, int, int]]:
        start, stop = start + self._first, stop + self._first
        i = self._index(start)
        while start < stop:
            file, first, end = self.files[i], self._starts[i], self._starts[i + 1]
            if start < end:
                self._use(i)
                yield file, start - first, min(stop, end) - first
            start, i = max(start, end), i + 1


def _joined(pieces: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, dtype), *pieces])


# --- files of our own


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds every token of a vocabulary: two bytes or four."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def shard_path(folder: Path, number: int) -> Path:
    """Where the tokens of a shard lie; ``.ends`` and ``.loss`` lie beside them, and ``.json`` says that it is whole."""
    return folder / f"{number:05d}.tokens"


def write_shard(path: Path, tokens: np.ndarray, lengths: np.ndarray, trained: np.ndarray | None, note: dict) -> None:
    """Write one shard; it is whole once its ``.json`` is there.

    Args:
        path: as of :func:`shard_path`.
        tokens: [T], of the type they are stored in.
        lengths: [documents], of each.
        trained: [T] bytes, 0 where a token is not to be predicted; None: all are.
        note: goes into its ``.json``.
    """
    contents = {".tokens": tokens, ".ends": np.cumsum(lengths, dtype="<i8")}
    if trained is not None:
        contents[".loss"] = trained.astype(np.uint8)
    facts = {"tokens": len(tokens), "documents": len(lengths), "dtype": tokens.dtype.str, "loss": trained is not None}
    # Under names of its own first: where file systems have no locks, others may be writing the same.
    draft = path.with_suffix(f".{uuid4().hex}{DRAFT}")
    for suffix, content in contents.items():
        content.tofile(draft)
        draft.replace(path.with_suffix(suffix))
    draft.write_text(json.dumps({**facts, **note}))
    draft.replace(path.with_suffix(".json"))


def open_shards(folder: Path, remedy: str) -> Tokens:
    """The stream of a folder of shards, as its ``shards.json`` lists them; their tokens are not read.

    Raises:
        FileNotFoundError: there is no such list.
        ValueError: it is damaged.
    """
    file = folder / "shards.json"
    try:
        facts = json.loads(file.read_text())
        return Tokens([_shard(folder, number, fact, remedy) for number, fact in enumerate(facts)])
    except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
        kind = UserFileError if isinstance(error, FileNotFoundError) else UserValueError
        raise kind(f"{file} is gone or damaged; {remedy}") from error


def _shard(folder: Path, number: int, fact: dict, remedy: str) -> TokenFile:
    path = shard_path(folder, number)
    loss = path.with_suffix(".loss") if fact["loss"] else None
    return TokenFile(path, np.dtype(fact["dtype"]), int(fact["tokens"]), int(fact["documents"]), loss, remedy)


def list_shards(folder: Path, count: int) -> list[dict]:
    """Write the ``shards.json`` of ``count`` whole shards, and give what it says; what the dead began is removed."""
    for begun in folder.glob(f"*{DRAFT}"):
        begun.unlink()
    facts = [json.loads(shard_path(folder, number).with_suffix(".json").read_text()) for number in range(count)]
    (folder / "shards.json").write_text(json.dumps(facts))
    return facts
