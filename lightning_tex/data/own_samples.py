"""Samples of a user's own data set, as batches of a data rank: by indices, or one behind the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from lightning_tex.data.order import PADDING, FixedBatchSampler, Share
from lightning_tex.parallel.errors import UserValueError


class Picked(Dataset):
    """A user's data set, by lists of indices.

    Args:
        dataset: with ``len``.
        collate: makes a batch of samples.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.collate = dataset, collate

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, samples: list[int]) -> tuple[Any, None]:
        together = getattr(self.dataset, "__getitems__", None)
        items = together(samples) if together is not None else [self.dataset[sample] for sample in samples]
        return self.collate(items), None


class EverySample(FixedBatchSampler):
    """All samples in their order; a rank of whose last slice nothing is left ends before it."""

    def __len__(self) -> int:
        share, size = self.share, len(self.dataset)  # type: ignore[arg-type]
        least = share.rows * (share.num_replicas - 1) + 1
        if 0 < size < least:
            raise UserValueError(
                f"the {size} samples to evaluate leave some of {share.num_replicas} data ranks without any, as each "
                f"takes {share.rows} of global_batch_size={share.global_batch_size}; legal: {least} samples and more, "
                "or a smaller global_batch_size"
            )
        whole, rest = divmod(size, share.global_batch_size)
        return whole + (rest > self.share.slice.start)

    def _epoch(self, epoch: int, first: int, end: int) -> Iterator[list[int]]:
        for samples in super()._epoch(epoch, first, end):
            yield [sample for sample in samples if sample != PADDING]


class Items(IterableDataset):
    """A data rank's samples of an iterable data set of the user's, which is read as a whole.

    Args:
        dataset: the user's.
        share: G and the place on the data axis.
        collate: makes a batch of samples.
        keep_tail: give the last micro-step, too, if it has fewer than G samples, and this rank some of them.
    """

    def __init__(self, dataset: Any, share: Share, collate: Callable[[list[Any]], Any], keep_tail: bool) -> None:
        self.dataset, self.share, self.collate, self.keep_tail = dataset, share, collate, keep_tail
        self.epoch = self.start = 0
        self.state: Any = None  # of the user's data set, at the start

    def seek(self, epoch: int, batch: int, period: int | None = None) -> None:
        """Let the next iteration yield epoch ``epoch`` from its micro-step ``batch`` on; it ends with the epoch."""
        self.epoch, self.start = epoch, batch

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch to yield; another one than the present starts at its first micro-step."""
        if epoch != self.epoch:
            self.seek(epoch, 0)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        size, mine = self.share.global_batch_size, self.share.slice
        first, self.start, state, self.state = self.start, 0, self.state, None
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self.epoch)
        if state is not None:
            self.dataset.load_state_dict(state)
        items = iter(self.dataset)
        if state is None:
            for _ in islice(items, first * size):
                pass
        for _ in count():
            found, kept = 0, []
            for item in islice(items, size):
                if mine.start <= found < mine.stop:
                    kept.append(item)
                found += 1
            if found < size and not (self.keep_tail and kept):
                return
            yield self.collate(kept), self._state()
            if found < size:
                return

    def _state(self) -> Any:
        """Of the user's data set, if it is one that goes on exactly."""
        exact = hasattr(self.dataset, "load_state_dict") and not _refills(getattr(self.dataset, "_ex_iterable", None))
        return self.dataset.state_dict() if exact else None


def _refills(examples: Any) -> bool:
    """Whether a stream of ``datasets`` has a shuffle buffer, which is not resumed but filled anew."""
    inner = [getattr(examples, "ex_iterable", None), *getattr(examples, "ex_iterables", [])]
    return "BufferShuffled" in type(examples).__name__ or any(_refills(one) for one in inner if one is not None)
