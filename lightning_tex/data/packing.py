"""Documents to blocks: one stream of tokens, cut into blocks that overlap by one token.

S sequence_length, b samples of a batch. Block i holds tokens ``[i S, i S + S + 1)`` of the stream, so that every token
but the stream's first is predicted exactly once, whatever S.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from lightning_tex.data.order import PADDING, Share
from lightning_tex.data.token_ids import IGNORE_INDEX
from lightning_tex.data.tokenizer import TextTokenizer, texts_of
from lightning_tex.data.tokens import Tokens
from lightning_tex.parallel.errors import UserValueError

if TYPE_CHECKING:
    import datasets

Batch = dict[str, Tensor]

_READ_AT_ONCE = 4096  # blocks


class Packer:
    """Cuts a stream of tokens, given piece by piece, into blocks.

    Args:
        sequence_length: S.
    """

    def __init__(self, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        self._rest: list[int] = []

    def push(self, tokens: list[int]) -> list[np.ndarray]:
        """Appends tokens; returns the int32 blocks ``[S + 1]`` that are now complete."""
        length, stream = self.sequence_length, self._rest + tokens
        count = max(0, (len(stream) - 1) // length)
        self._rest = stream[count * length :]
        return [np.asarray(stream[i * length : i * length + length + 1], dtype=np.int32) for i in range(count)]

    def flush(self) -> list[np.ndarray]:
        """The last, incomplete block filled up with ``IGNORE_INDEX``; none if it would predict nothing."""
        rest, self._rest = self._rest, []
        missing = self.sequence_length + 1 - len(rest)
        return [np.asarray(rest + [IGNORE_INDEX] * missing, dtype=np.int32)] if len(rest) > 1 else []


def stream_fingerprint(stream: Tokens, sequence_length: int) -> str:
    """A digest of a stream's tokens and of S, 32 hexadecimal digits; reads all of them."""
    digest = hashlib.blake2b(digest_size=16)
    for piece in stream.pieces():
        digest.update(piece.astype("<i4").data)
    digest.update(sequence_length.to_bytes(8, "little"))
    return digest.hexdigest()


def by_document(batch: Batch, end_of_document_id: int) -> Batch:
    """The batch with its documents apart: ``segments`` [b, S], and no label from another document.

    A document ends with its end-of-document token, of which the next one's first token would be the label; that is
    ``IGNORE_INDEX``. Padding, where nothing is left to predict, is one document of its own.
    """
    inputs, labels = batch["input_ids"], batch["labels"]
    # What follows the last token of a stream is padding, and holds the end's id.
    is_token = torch.cat([labels[:, :1] != IGNORE_INDEX, labels[:, :-1] != IGNORE_INDEX], 1)
    ends = (inputs == end_of_document_id) & is_token
    segments = torch.cat([torch.zeros_like(inputs[:, :1]), ends[:, :-1].cumsum(1)], 1)
    return {**batch, "labels": labels.masked_fill(ends, IGNORE_INDEX), "segments": segments}


def as_batch(blocks: np.ndarray, samples: list[int], end_of_document_id: int) -> Batch:
    """Blocks ``[b, S + 1]`` and their indices to int64 input_ids ``[b, S]``, labels ``[b, S]`` and sample ``[b]``."""
    tokens = torch.from_numpy(blocks.astype(np.int64))
    inputs = tokens[:, :-1]
    return {
        "input_ids": inputs.masked_fill(inputs == IGNORE_INDEX, end_of_document_id),
        "labels": tokens[:, 1:].contiguous(),
        "sample": torch.tensor(samples, dtype=torch.int64),
    }


class Samples(Dataset):
    """What batches are made of: indexed by a list of samples it gives one.

    The index ``PADDING`` gives a row of labels ``IGNORE_INDEX``.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, samples: list[int]) -> Batch:
        raise NotImplementedError


class Blocks(Samples):
    """A stream of tokens, cut into blocks.

    Args:
        stream: of tokens.
        sequence_length: S.
        end_of_document_id: what input_ids hold where there is no token.
        vocab_size: every token is below it.
        keep_tail: the last, incomplete block is one, too, filled up with ``IGNORE_INDEX``.

    Raises:
        ValueError: when a batch is read, that a file is damaged or holds what is no token.
        FileNotFoundError: that it is gone.
    """

    def __init__(
        self, stream: Tokens, sequence_length: int, end_of_document_id: int, vocab_size: int, keep_tail: bool = False
    ) -> None:
        self.stream, self.sequence_length = stream, sequence_length
        self.end_of_document_id, self.vocab_size = end_of_document_id, vocab_size
        predicted = max(0, len(stream) - 1)
        self._len = -(-predicted // sequence_length) if keep_tail else predicted // sequence_length

    def __len__(self) -> int:
        return self._len

    def __str__(self) -> str:
        documents = f"{self.stream.documents:,} documents, {len(self.stream):,} tokens"
        return f"{documents}, {len(self):,} blocks of {self.sequence_length:,}"

    def __getitem__(self, samples: list[int]) -> Batch:
        batch = as_batch(self._read(samples), samples, self.end_of_document_id)
        if self.stream.says_what_is_trained:
            for row, sample in zip(batch["labels"], samples, strict=True):
                if sample != PADDING:
                    start = sample * self.sequence_length + 1
                    trained = self.stream.trained(start, min(start + self.sequence_length, len(self.stream)))
                    row[: len(trained)].masked_fill_(torch.from_numpy(trained == 0), IGNORE_INDEX)
        return batch

    def tokens(self, batch_size: int = _READ_AT_ONCE) -> Iterator[np.ndarray]:
        """All blocks in order, as int32 arrays ``[up to batch_size, S + 1]``."""
        for start in range(0, len(self), batch_size):
            yield self._read(list(range(start, min(start + batch_size, len(self)))))

    def _read(self, samples: list[int]) -> np.ndarray:
        length = self.sequence_length
        blocks = np.full((len(samples), length + 1), IGNORE_INDEX, dtype=np.int32)
        for row, sample in zip(blocks, samples, strict=True):
            if sample != PADDING:
                start = sample * length
                tokens = self.stream.read(start, min(start + length + 1, len(self.stream)))
                row[: len(tokens)] = tokens
                require_own(self.stream, tokens, start, self.vocab_size)
        return blocks


def require_own(stream: Tokens, tokens: np.ndarray, start: int, vocab_size: int) -> None:
    """Refuse what is no token of a vocabulary.

    Raises:
        ValueError: naming file and place.
    """
    illegal = (tokens < 0) | (tokens >= vocab_size)
    if illegal.any():
        place = int(illegal.argmax())
        raise UserValueError(
            f"{stream.file_of(start + place)} has {tokens[place]} as token {start + place} of its stream, and the "
            f"tokenizer has {vocab_size} tokens: it is damaged, or another tokenizer's; {stream.files[0].remedy}"
        )


class StreamedBlocks(IterableDataset):
    """Tokenises and packs a stream while it is read; gives one data rank's batches.

    Block i of the stream belongs to micro-step ``i // G``, and there to the rank whose slice holds ``i % G``. Every
    rank reads and tokenises the whole stream; a resumed run does so from the stream's start, too.

    Args:
        documents: a streamed data set with a column ``text``.
        tokenizer: encodes them.
        sequence_length: S.
        share: G and the place on the data axis.
        pad: end with a padded batch, so that no token is lost; else leave the incomplete global batch out.
        reading: is entered around the reading of documents, to name what cannot be read.
    """

    def __init__(
        self,
        documents: datasets.IterableDataset,
        tokenizer: TextTokenizer,
        sequence_length: int,
        share: Share,
        pad: bool = False,
        reading: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.documents = documents
        self.reading = reading
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.share = share
        self.pad = pad
        self.epoch = 0
        self.start = 0

    def seek(self, epoch: int, batch: int, period: int | None = None) -> None:
        """Lets the next iteration yield epoch ``epoch`` from its micro-step ``batch`` on; it ends with the stream."""
        self.epoch, self.start = epoch, batch

    def set_epoch(self, epoch: int) -> None:
        """Selects the epoch to yield; another one than the present starts at its first micro-step."""
        if epoch != self.epoch:
            self.seek(epoch, 0)

    def __iter__(self) -> Iterator[Batch]:
        self.documents.set_epoch(self.epoch)
        first, self.start = self.start, 0
        batch: list[np.ndarray] = []
        step = 0
        for block in self._blocks():
            batch.append(block)
            if len(batch) == self.share.global_batch_size:
                if step >= first:
                    yield self._share_of(batch, step)
                batch, step = [], step + 1
        if batch and self.pad and step >= first:
            yield self._share_of(batch, step)
        if not self.pad and not step:
            raise UserValueError(
                f"global_batch_size={self.share.global_batch_size} is more than the {len(batch)} training blocks of "
                f"sequence_length={self.sequence_length} that the stream has; legal: smaller ones, or more text"
            )

    def _blocks(self) -> Iterator[np.ndarray]:
        packer, end = Packer(self.sequence_length), self.tokenizer.end_of_document_id
        for text in self._texts():
            yield from packer.push([*self.tokenizer.encode(text), end])
        if self.pad:
            yield from packer.flush()

    def _texts(self) -> Iterator[str]:
        with self.reading():
            yield from texts_of(self.documents)

    def _share_of(self, batch: list[np.ndarray], step: int) -> Batch:
        missing = self.share.global_batch_size - len(batch)
        first = step * self.share.global_batch_size
        samples = [*range(first, first + len(batch)), *[PADDING] * missing]
        rows = batch + [np.full(self.sequence_length + 1, IGNORE_INDEX, dtype=np.int32)] * missing
        mine = self.share.slice
        return as_batch(np.stack(rows[mine]), samples[mine], self.tokenizer.end_of_document_id)


def unigram_loss(train: Blocks, held_out: Blocks, vocab_size: int, collate: Callable[[Batch], Batch]) -> float:
    """Loss of the model that knows only how frequent each token is.

    Add-one smoothed counts over the training tokens, on the labels of the held-out blocks (padding left out).

    Args:
        train: blocks whose tokens are counted.
        held_out: blocks whose labels are predicted.
        vocab_size: of the counts.
        collate: makes batches of the held-out ones, as a loader's ``collate_fn``.

    Returns:
        nats per token.
    """
    counts = np.ones(vocab_size)
    for blocks in train.tokens():
        counts += np.bincount(blocks[:, :-1].ravel(), minlength=vocab_size)
    nats = np.log(counts.sum()) - np.log(counts)
    total, tokens = 0.0, 0
    for first in range(0, len(held_out), _READ_AT_ONCE):
        batch = collate(held_out[list(range(first, min(first + _READ_AT_ONCE, len(held_out))))])
        labels = batch["labels"][batch["labels"] != IGNORE_INDEX].numpy()
        total, tokens = total + nats[labels].sum(), tokens + labels.size
    return float(total / tokens)
