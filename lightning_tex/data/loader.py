"""A training ``DataLoader`` that starts where a :class:`~lightning_tex.data.resume.Cursor` stands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from lightning_tex.data.order import GlobalBatchSampler
from lightning_tex.data.packing import Batch, Samples, StreamedBlocks
from lightning_tex.data.resume import Cursor, SamplerCursor
from lightning_tex.data.workers import end_workers


class ResumableLoader(DataLoader):
    """Yields the rest of the cursor's epoch, while ``len`` remains that of a whole one, as Lightning expects.

    Args:
        dataset: samples on disk or of a stream.
        sampler: of those on disk; None for a stream.
        num_workers: processes that read ahead; the order does not depend on them. A whole stream uses at most one.
        pin_memory: copy batches to page-locked memory.
    """

    def __init__(
        self,
        dataset: Samples | StreamedBlocks,
        sampler: GlobalBatchSampler | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs["batch_size"] = None  # the sampler yields whole batches
        super().__init__(dataset, sampler=sampler, num_workers=num_workers, pin_memory=pin_memory, **kwargs)
        self.order: GlobalBatchSampler | StreamedBlocks = dataset if sampler is None else sampler  # type: ignore[assignment]
        self.cursor: Cursor | None = None
        self.batches_fetched = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator: Lightning makes iterators before it knows the epoch, and workers must not read ahead by then.
        assert self.cursor is not None
        epoch, step = self.cursor.begin()
        # Lightning counts the batches of an epoch itself, and after some restarts its epochs begin within ours.
        self.order.seek(epoch, step, period=self.cursor.period())
        batches = super().__iter__()
        try:
            for batch in batches:
                step += 1
                self.batches_fetched += 1
                yield batch
        finally:
            end_workers(batches)
        self.cursor.run_out(step)

    def state_dict(self) -> dict[str, int]:
        """Epoch and micro-step to go on with. Having this method tells Lightning that the loader can resume."""
        assert self.cursor is not None
        epoch, batch = self.cursor.position()
        return {"epoch": epoch, "batch": batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Does nothing: the data module restores the position, after checking that the data is the same."""


def loader_cursor(loader: ResumableLoader, epoch: int, batch: int) -> Cursor:
    """A cursor for a plain loop over the loader, in which a fetched batch counts as trained on."""
    loader.order.seek(epoch, batch)
    length = float("inf") if loader.sampler is not loader.order else len(loader)
    return SamplerCursor(lambda: loader.batches_fetched, lambda: length, epoch, batch, order=loader.order)
