"""Conversations as samples: several in a row that do not see each other, or one in a row with padding.

b samples of a batch, S positions. Of a conversation of n tokens n - 1 are inputs, as nothing follows the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lightning_tex.data.order import PADDING
from lightning_tex.data.packing import Batch, Samples, require_own
from lightning_tex.data.token_ids import IGNORE_INDEX
from lightning_tex.data.tokens import Tokens


class Conversations:
    """Documents of a stream, by their numbers.

    Args:
        stream: of tokens, which says which are learnt.
        ends: [N], where each conversation ends in it.
        vocab_size: every token is below it.
    """

    def __init__(self, stream: Tokens, ends: np.ndarray, vocab_size: int) -> None:
        self.stream, self.ends, self.vocab_size = stream, ends, vocab_size

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> np.ndarray:
        """[N], the inputs of each."""
        return np.diff(self.ends, prepend=0) - 1

    def start(self, number: int) -> int:
        """Where one begins in the stream."""
        return int(self.ends[number - 1]) if number else 0

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels of one, [n - 1] each."""
        start, stop = self.start(number), int(self.ends[number])
        tokens = self.stream.read(start, stop)
        require_own(self.stream, tokens, start, self.vocab_size)
        learnt = self.stream.trained(start, stop)[1:] != 0
        return tokens[:-1].astype(np.int64), np.where(learnt, tokens[1:].astype(np.int64), IGNORE_INDEX)


class _Rows:
    """Rows that are being filled.

    Args:
        samples: of the rows.
        width: S.
        fill: what inputs hold where there is no token.
    """

    def __init__(self, samples: Sequence[int], width: int, fill: int) -> None:
        shape = (len(samples), width)
        self.samples, self.fill = samples, fill
        self.inputs, self.labels = np.full(shape, fill, np.int64), np.full(shape, IGNORE_INDEX, np.int64)
        self.mask, self.segments = np.zeros(shape, np.int64), np.zeros(shape, np.int64)

    def put(self, row: int, at: int, inputs: np.ndarray, labels: np.ndarray, segment: int = 0) -> int:
        """Put one conversation into a row; where it ends there."""
        end = at + len(inputs)
        self.inputs[row, at:end], self.labels[row, at:end] = inputs, labels
        self.mask[row, at:end] = 1
        # Models take a label that repeats the padding behind it for padding, too, and this one is to be learnt.
        self.inputs[row, end:] = int(self.fill == 0) if len(labels) and labels[-1] == self.fill else self.fill
        self.segments[row, at:] = segment  # padding behind the last one belongs to it, and is seen by nobody
        return end

    def batch(self, with_segments: bool) -> Batch:
        """As the model takes it."""
        named = {"input_ids": self.inputs, "labels": self.labels, "attention_mask": self.mask}
        if with_segments:
            named["segments"] = self.segments
        return {**{k: torch.from_numpy(v) for k, v in named.items()}, "sample": torch.tensor(list(self.samples))}


class PackedConversations(Samples):
    """Rows of whole conversations, which do not see each other.

    Args:
        conversations: all.
        order: their numbers, row by row.
        row_ends: [rows], where each row ends among them.
        width: S.
        fill: what inputs hold where there is no token.
    """

    def __init__(
        self, conversations: Conversations, order: np.ndarray, row_ends: np.ndarray, width: int, fill: int
    ) -> None:
        self.conversations, self.order, self.row_ends = conversations, order, row_ends
        self.width, self.fill = width, fill

    def __len__(self) -> int:
        return len(self.row_ends)

    def __getitem__(self, samples: list[int]) -> Batch:
        rows = _Rows(samples, self.width, self.fill)
        for row, sample in enumerate(samples):
            at = 0
            for segment, number in enumerate(self._of(sample)):
                at = rows.put(row, at, *self.conversations.read(int(number)), segment)
        return rows.batch(with_segments=True)

    def _of(self, sample: int) -> np.ndarray:
        if sample == PADDING:
            return np.empty(0, np.int64)
        return self.order[self.row_ends[sample - 1] if sample else 0 : self.row_ends[sample]]


class PaddedConversations(Samples):
    """A conversation a row, padded to the least of some lengths that holds the longest one of the batch.

    Args:
        conversations: all.
        buckets: the lengths, in rising order; the last one holds every conversation.
        fill: what inputs hold where there is no token.
    """

    def __init__(self, conversations: Conversations, buckets: Sequence[int], fill: int) -> None:
        self.conversations, self.buckets, self.fill = conversations, np.array(buckets), fill
        self.bucket_of = np.searchsorted(self.buckets, conversations.lengths)  # [N]

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, samples: list[int]) -> Batch:
        width = max((int(self.buckets[self.bucket_of[s]]) for s in samples if s != PADDING), default=self.buckets[0])
        rows = _Rows(samples, int(width), self.fill)
        for row, sample in enumerate(samples):
            if sample != PADDING:
                rows.put(row, 0, *self.conversations.read(sample))
        return rows.batch(with_segments=False)


def write_numbers(file: Path, numbers: np.ndarray) -> None:
    """Numbers that :func:`mapped_numbers` gives again."""
    numbers.astype("<i8").tofile(file)


def mapped_numbers(file: Path) -> np.ndarray:
    """Mapped, and not loaded."""
    return np.memmap(file, "<i8", "r") if file.stat().st_size else np.empty(0, np.int64)
