"""One part of a stream: its documents from a state on, and the blocks that they make.

A block begins within a document; the state before it says which one, and how many of its tokens are done. Documents
are read a window at a time. The state has the place where the window of that document begins, and a digest of the texts
from there up to it, by which another text at that place is noticed.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from lightning_tex.data.streams.order import StreamOrder
from lightning_tex.data.streams.shards import Place, Shards, required_text
from lightning_tex.data.tokenizer import TextTokenizer
from lightning_tex.parallel.errors import UserValueError

_AT_ONCE = 1 << 15  # characters that are tokenised, and the rest of the last document of these


@dataclass(frozen=True)
class PartState:
    """Where a part stands.

    Args:
        position: the unit in which the window begins, see :class:`StreamOrder`.
        row: of its shard, from which on rows are the window's.
        place: of that row.
        taken: documents of the window before the one that stands next.
        digest: of the texts of the window up to and with that one; empty at the very beginning.
        tokens: of that document which have been predicted.
    """

    position: int
    row: int = 0
    place: Place = None
    taken: int = 0
    digest: str = ""
    tokens: int = 0


@dataclass(frozen=True)
class _Window:
    start: PartState
    texts: list[str]  # in their order


class PartDocuments:
    """The windows of a part from a state on, without end.

    Args:
        shards: of the stream.
        order: of it.
    """

    def __init__(self, shards: Shards, order: StreamOrder) -> None:
        self.shards, self.order = shards, order

    def windows(self, start: PartState) -> Iterator[_Window]:
        """From the beginning of the window that a state stands in."""
        start = PartState(start.position, start.row, start.place)
        documents = self._documents(start)
        while True:
            texts, end = [], start
            for _ in range(self.order.window):
                text, end = next(documents)
                texts.append(text)
            order = self.order.within(start.position, start.row, len(texts))
            yield _Window(start, [texts[i] for i in order])
            start = end

    def _documents(self, start: PartState) -> Iterator[tuple[str, PartState]]:
        """The part's documents, each with the state behind it."""
        position, row, place = start.position, start.row, start.place
        empty = 0  # units one behind the other, of which an epoch may have the first ones and the next the last
        while empty <= 2 * self.order.units:
            shard, remainder = self.order.unit(position)
            empty += 1
            for text_of, behind in self.shards.read(shard, place):
                if self.order.is_in(remainder, row):
                    empty = 0
                    text = required_text(text_of, row, self.shards.name_of(shard))
                    yield text, PartState(position, row + 1, behind)
                row += 1
            position, row, place = position + self.order.parts, 0, None
        raise UserValueError(
            f"part {position % self.order.parts} of stream_parts={self.order.parts} has no documents in "
            f"{self.order.shards} shards; legal: fewer parts, or more data"
        )


class PartBlocks:
    """The blocks of a part from a state on, without end.

    Args:
        documents: of the part.
        tokenizer: encodes them, each followed by its end-of-document token.
        sequence_length: S.
    """

    def __init__(self, documents: PartDocuments, tokenizer: TextTokenizer, sequence_length: int) -> None:
        self.documents, self.tokenizer, self.sequence_length = documents, tokenizer, sequence_length

    def read(self, start: PartState) -> Iterator[tuple[np.ndarray, PartState]]:
        """Blocks [S + 1] int32, each with the state behind it.

        Raises:
            ValueError: the documents before that state are others than those it was left with.
        """
        length, held = self.sequence_length, _Held(start.tokens)
        for state, ids in self._tokenised(start):
            held.add(state, ids)
            while held.tokens > length:
                yield held.take(length), held.state

    def _tokenised(self, start: PartState) -> Iterator[tuple[PartState, list[int]]]:
        """The tokens of documents from a state on, each with the state before it."""
        done, expected = start.taken, start.digest
        for window in self.documents.windows(start):
            states = self._states(window)
            if expected and (done >= len(states) or states[done].digest != expected):
                raise UserValueError(
                    f"the data has changed: what stands before and at row {window.start.row} + {done} of "
                    f"{self._shard_of(window)} is not what the run read that the checkpoint is of; resume with the "
                    "checkpoint's data, or start a new run from its weights"
                )
            while done < len(states):
                texts = _some_of(window.texts, done)
                yield from zip(states[done:], self.tokenizer.encode_documents(texts), strict=False)
                done += len(texts)
            done, expected = 0, ""

    def _states(self, window: _Window) -> list[PartState]:
        digest, states = hashlib.blake2b(digest_size=8), []
        for taken, text in enumerate(window.texts):
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
            states.append(replace(window.start, taken=taken, digest=digest.hexdigest()))
        return states

    def _shard_of(self, window: _Window) -> str:
        shard, _ = self.documents.order.unit(window.start.position)
        return self.documents.shards.name_of(shard)


def _some_of(texts: list[str], first: int) -> list[str]:
    """From the first of them on, as many as are tokenised at once."""
    stop, size = first, 0
    while stop < len(texts) and size < _AT_ONCE:
        size, stop = size + len(texts[stop]), stop + 1
    return texts[first:stop]


class _Held:
    """Tokens of documents that no block has had yet.

    Args:
        done: tokens of the first document which blocks have had.
    """

    def __init__(self, done: int) -> None:
        self._documents: deque[tuple[PartState, np.ndarray]] = deque()
        self._done = done
        self.tokens = -done

    def add(self, state: PartState, ids: list[int]) -> None:
        """Tokens of one more document."""
        self._documents.append((state, np.array(ids, np.int32)))
        self.tokens += len(ids)

    @property
    def state(self) -> PartState:
        """Before the first token that is held."""
        return replace(self._documents[0][0], tokens=self._done)

    def take(self, length: int) -> np.ndarray:
        """The first ``length + 1`` tokens, of which the last remains."""
        pieces, missing, done = [], length + 1, self._done
        for _, ids in self._documents:
            pieces.append(ids[done : done + missing])
            missing, done = missing - len(pieces[-1]), 0
            if not missing:
                break
        self.tokens -= length
        self._done += length
        while self._done >= len(self._documents[0][1]):
            self._done -= len(self._documents.popleft()[1])
        return np.concatenate(pieces)
