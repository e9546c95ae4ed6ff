"""Whole documents of text in rows that do not see each other, instead of blocks that cut them: best fit.

S sequence_length. A document of more than S + 1 tokens is divided into pieces that overlap by one token, so that every
token but a document's first is predicted once.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from lightning_tex.data.chat.fitting import best_fit
from lightning_tex.data.chat.samples import Conversations, PackedConversations, mapped_numbers, write_numbers
from lightning_tex.data.tokens import Tokens

_AT_ONCE = 1 << 18  # pieces that are fitted into each other's rows
_NUMBERS = ("starts", "stops", "order", "row_ends")


class Pieces(Conversations):
    """Documents of a stream, and parts of those that are longer than a row.

    Args:
        stream: of tokens.
        starts, stops: [N], of each piece.
        vocab_size: every token is below it.
    """

    def __init__(self, stream: Tokens, starts: np.ndarray, stops: np.ndarray, vocab_size: int) -> None:
        super().__init__(stream, stops, vocab_size)
        self.starts = starts

    @property
    def lengths(self) -> np.ndarray:
        return self.ends - self.starts - 1

    def start(self, number: int) -> int:
        return int(self.starts[number])


class FittedDocuments(PackedConversations):
    """Rows of whole documents."""

    def __str__(self) -> str:
        inputs, room = int(self.conversations.lengths.sum()), len(self) * self.width
        stream = self.conversations.stream
        return (
            f"{stream.documents:,} documents, {len(stream):,} tokens, {len(self):,} rows of {self.width:,}, "
            f"{100 * (room - inputs) / max(1, room):.1f} % of which is padding"
        )


def pieces_of(ends: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Where pieces of documents start and stop: none of a document that has nothing to predict.

    Args:
        ends: [documents], of each in its stream.
        sequence_length: S.
    """
    begins = np.concatenate([[0], ends[:-1]]).astype(np.int64)[: len(ends)]
    counts = np.maximum(0, -(-(ends - begins - 1) // sequence_length))
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of a piece in its document
    starts = np.repeat(begins, counts) + number * sequence_length
    return starts, np.minimum(starts + sequence_length + 1, np.repeat(ends, counts))


def fit_key(stream: Tokens, sequence_length: int) -> str:
    """Of all that decides how documents lie in rows: their lengths and S."""
    digest = hashlib.blake2b(f"{sequence_length}/".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(stream.ends(), "<i8").data)
    return digest.hexdigest()


def fit(stream: Tokens, sequence_length: int, folder: Path) -> None:
    """Write how documents lie in rows, for :func:`open_fitted`."""
    starts, stops = pieces_of(np.asarray(stream.ends()), sequence_length)
    orders, ends = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for first in range(0, len(starts), _AT_ONCE):
        lengths = (stops - starts - 1)[first : first + _AT_ONCE]
        order, row_ends = best_fit(lengths, sequence_length)
        orders.append(order + first)
        ends.append(row_ends + first)
    numbers = (starts, stops, np.concatenate(orders), np.concatenate(ends))
    for name, values in zip(_NUMBERS, numbers, strict=True):
        write_numbers(folder / f"{name}.numbers", values)


def open_fitted(stream: Tokens, folder: Path, sequence_length: int, vocab_size: int, fill: int) -> FittedDocuments:
    """Rows as :func:`fit` has laid them.

    Args:
        stream: of tokens.
        folder: that it wrote.
        sequence_length: S.
        vocab_size: every token is below it.
        fill: what inputs hold where there is no token.
    """
    starts, stops, order, row_ends = (mapped_numbers(folder / f"{name}.numbers") for name in _NUMBERS)
    pieces = Pieces(stream, starts, stops, vocab_size)
    return FittedDocuments(pieces, order, row_ends, sequence_length, fill)
