"""Parts of a stream to batches: which rows of a global batch are of which part, and who reads it.

G samples in a micro-step, P parts. Rows ``[p G/P, (p + 1) G/P)`` of every global batch are the next blocks of part p:
batches are the same on every data axis and with any number of workers. A data rank reads the parts that its rows are
of; its workers divide those among them, and the rank puts the rows of all together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_tex.data.loader import ResumableLoader
from lightning_tex.data.order import Share
from lightning_tex.data.packing import Batch, as_batch
from lightning_tex.data.resume import Cursor, Positions
from lightning_tex.data.streams.order import StreamOrder
from lightning_tex.data.streams.parts import PartBlocks, PartState
from lightning_tex.data.workers import end_workers

States = dict[int, PartState]  # by part
Piece = tuple[Batch, States]  # some rows, and where their parts stand behind them


class PartRows(IterableDataset):
    """A data rank's rows of each micro-step, without end; in a worker those of its share of the parts.

    Args:
        blocks: of a part from a state on.
        order: of the stream.
        share: G and the place on the data axis.
        collate: makes a batch of rows.
        reading: is entered around the reading of documents, to name what cannot be read.
    """

    def __init__(
        self,
        blocks: PartBlocks,
        order: StreamOrder,
        share: Share,
        collate: Callable[[Batch], Batch],
        reading: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.blocks, self.order, self.share = blocks, order, share
        self.collate, self.reading = collate, reading
        self.step = 0
        self.states: States = {}

    @property
    def rows_of_a_part(self) -> int:
        """G / P."""
        return self.share.global_batch_size // self.order.parts

    @property
    def parts(self) -> range:
        """Those that this rank's rows are of."""
        return self.share.parts(self.order.parts)

    def seek(self, step: int, states: States) -> None:
        """Let the next iteration begin with this micro-step, before which the parts stand so."""
        self.step, self.states = step, states

    def __iter__(self) -> Iterator[Piece]:
        worker = get_worker_info()
        parts: Any = list(self.parts)
        if worker is not None:
            parts = np.array_split(parts, worker.num_workers)[worker.id].tolist()
        with self.reading():
            streams = {part: self.blocks.read(self.states[part]) for part in parts}
            for step in itertools.count(self.step):
                yield self._piece(streams, step * self.share.global_batch_size)

    def _piece(self, streams: dict[int, Any], first_sample: int) -> Piece:
        rows, blocks, samples, states = self.share.slice, [], [], {}
        for part, stream in streams.items():
            for row in range(part * self.rows_of_a_part, (part + 1) * self.rows_of_a_part):
                block, states[part] = next(stream)
                if rows.start <= row < rows.stop:
                    blocks.append(block)
                    samples.append(first_sample + row)
        end = self.blocks.tokenizer.end_of_document_id
        return self.collate(as_batch(np.stack(blocks), samples, end)), states


class StreamLoader(ResumableLoader):
    """Batches of a data rank's rows from where the cursor stands, without end.

    Args:
        rows: of this rank.
        positions: of its parts; None: they are given before it is iterated.
        num_workers: processes that read ahead, at most one a part.
        pin_memory: copy batches to page-locked memory.
    """

    def __init__(
        self, rows: PartRows, positions: Positions | None = None, num_workers: int = 0, pin_memory: bool = False
    ) -> None:
        super().__init__(rows, None, min(num_workers, len(rows.parts)), pin_memory, collate_fn=_as_it_is)  # type: ignore[arg-type]
        self.rows, self.positions = rows, positions

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        assert self.cursor is not None and self.positions is not None
        _, step = self.cursor.begin()
        self.rows.seek(step, self.positions.before(step))
        pieces = DataLoader.__iter__(self)
        try:
            while True:
                batches, states = zip(*itertools.islice(pieces, max(1, self.num_workers)), strict=True)
                step += 1
                self.batches_fetched += 1
                merged = {part: state for some in states for part, state in some.items()}
                self.positions.add(step, merged, self.cursor.position()[1])
                yield self._joined(batches)
        finally:
            end_workers(pieces)

    def _joined(self, batches: tuple[Batch, ...]) -> Batch:
        if len(batches) == 1:
            return batches[0]
        joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        return {name: values.pin_memory() for name, values in joined.items()} if self.pin_memory else joined


def endless_cursor(steps_done: Callable[[], int], step: int) -> Cursor:
    """A cursor over the micro-steps of a run, of which there is no last one."""
    return Cursor(steps_done, lambda: float("inf"), 0, step)


def _as_it_is(piece: Piece) -> Piece:
    return piece
