"""What is held out of a stream, to batches: each data rank tokenises its share of the documents.

G samples in a micro-step, P parts. Document j is of part j modulo P; a part's tokens are cut into blocks, and rows
``[p G/P, (p + 1) G/P)`` of every global batch are the next blocks of part p: the same ones on every data axis.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy as np
from torch.utils.data import IterableDataset

from lightning_tex.data.order import PADDING, Share
from lightning_tex.data.packing import Batch, Packer, as_batch
from lightning_tex.data.streams.held_out import HeldOutDocuments
from lightning_tex.data.token_ids import IGNORE_INDEX
from lightning_tex.data.tokenizer import TextTokenizer


class HeldOutRows(IterableDataset):
    """A data rank's rows of every global batch, until its parts have ended: ranks end at different times.

    Every rank reads over all documents, and tokenises those of the parts that its rows are of. The last blocks are
    filled up, and rows of parts that have ended are padding; of a rank without any document it is the first batch.

    Args:
        documents: that are held out.
        parts: P.
        tokenizer: encodes them, each followed by its end-of-document token.
        sequence_length: S.
        share: G and the place on the data axis.
        reading: is entered around the reading of documents, to name what cannot be read.
    """

    def __init__(
        self,
        documents: HeldOutDocuments,
        parts: int,
        tokenizer: TextTokenizer,
        sequence_length: int,
        share: Share,
        reading: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.documents, self.parts, self.tokenizer = documents, parts, tokenizer
        self.sequence_length, self.share, self.reading = sequence_length, share, reading

    def __iter__(self) -> Iterator[Batch]:
        each, step = self.share.global_batch_size // self.parts, 0
        blocks: dict[int, deque[np.ndarray]] = {part: deque() for part in self.share.parts(self.parts)}
        packers = {part: Packer(self.sequence_length) for part in blocks}
        with self.reading():
            for number, document in enumerate(self.documents):
                part = number % self.parts
                if part not in packers:
                    continue
                tokens = [*self.tokenizer.encode(document()), self.tokenizer.end_of_document_id]
                blocks[part].extend(packers[part].push(tokens))
                while min(map(len, blocks.values())) >= each:
                    yield self._batch(blocks, step)
                    step += 1
        for part, packer in packers.items():
            blocks[part].extend(packer.flush())
        while step == 0 or any(blocks.values()):
            yield self._batch(blocks, step)
            step += 1

    def _batch(self, blocks: dict[int, deque[np.ndarray]], step: int) -> Batch:
        size, mine = self.share.global_batch_size, self.share.slice
        each, samples, rows = size // self.parts, [], []
        for part, own in blocks.items():
            for row in range(part * each, (part + 1) * each):
                block = own.popleft() if own else None
                if mine.start <= row < mine.stop:
                    samples.append(PADDING if block is None else step * size + row)
                    rows.append(np.full(self.sequence_length + 1, IGNORE_INDEX, np.int32) if block is None else block)
        return as_batch(np.stack(rows), samples, self.tokenizer.end_of_document_id)
