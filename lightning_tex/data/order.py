"""Which sample is read when, and by whom: pure functions of (seed, epoch, fingerprint) and a global sample counter.

G samples in one micro-step over the whole data axis (``global_batch_size``), n data ranks, s micro-step in its epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lightning_tex.parallel.errors import UserValueError

PADDING = -1  # the index of a row that holds no sample


def sample_order(size: int, seed: int, epoch: int, fingerprint: str) -> np.ndarray:
    """The permutation of ``range(size)`` in which one epoch reads its samples.

    Sorts the samples by an integer hash of their index, so that the order depends on no library's random streams and is
    the same on every machine and version.

    Returns:
        int64 array ``[size]``.
    """
    keys = hashed(np.arange(size), f"{seed}/{epoch}/{fingerprint}")
    return np.argsort(keys, kind="stable").astype(np.int64)


def hashed(numbers: np.ndarray, key: str) -> np.ndarray:
    """A uint64 of each number of 0 or more, as if drawn at random by the key; different ones of different numbers."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return _splitmix64(_splitmix64(numbers.astype(np.uint64)) ^ np.uint64(int.from_bytes(digest, "little")))


def _splitmix64(x: np.ndarray) -> np.ndarray:
    # A bijection of 64-bit integers (Steele, Lea, Flood 2014): distinct samples never tie.
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Share:
    """What part of every global batch one data rank reads.

    Args:
        global_batch_size: G, samples of one micro-step over the whole data axis.
        num_replicas: n, size of the data axis.
        rank: this process's coordinate on it.

    Raises:
        ValueError: G is not positive or not a multiple of n.
    """

    global_batch_size: int
    num_replicas: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        size, n = self.global_batch_size, self.num_replicas
        if size < 1 or size % n:
            lower = max(n, size // n * n)
            raise UserValueError(
                f"global_batch_size={size} cannot be shared by a data axis of size {n}; "
                f"legal are the multiples of {n}, the nearest {lower} and {lower + n}"
            )

    @property
    def rows(self) -> int:
        """Samples of one batch of this rank, G / n."""
        return self.global_batch_size // self.num_replicas

    @property
    def slice(self) -> slice:
        """This rank's contiguous part ``[rank G/n, (rank + 1) G/n)`` of a global batch."""
        return slice(self.rank * self.rows, (self.rank + 1) * self.rows)

    def parts(self, count: int) -> range:
        """Of ``count`` equal parts of a global batch, a divisor of G, those that this rank has rows of."""
        rows, each = self.slice, self.global_batch_size // count
        return range(rows.start // each, -(-rows.stop // each))


class GlobalBatchSampler(DistributedSampler):
    """Yields, micro-step by micro-step, the list of sample indices of one data rank.

    Micro-step s of an epoch consumes ``order[s G : (s + 1) G]``; the rank takes its contiguous slice of that. So the
    order of samples is the same on every layout. It is a ``DistributedSampler`` because Lightning leaves those alone
    and would otherwise wrap it once more. Give it to a ``DataLoader`` as ``sampler`` with ``batch_size=None``.

    Args:
        dataset: sized; of its samples the indices ``0 .. len(dataset) - 1`` are yielded.
        share: G and the place on the data axis.
        seed: of the shuffle.
        fingerprint: of the data set; enters the shuffle.
        shuffle: by :func:`sample_order`, else in the order of the data set.
        pad: end with a batch filled up by index ``PADDING``, so that no sample is lost and all ranks have equally many
            batches; else the last incomplete global batch is left out.
    """

    def __init__(
        self,
        dataset: Dataset,
        share: Share,
        seed: int = 0,
        fingerprint: str = "",
        shuffle: bool = True,
        pad: bool = False,
    ) -> None:
        super().__init__(
            dataset, num_replicas=share.num_replicas, rank=share.rank, shuffle=shuffle, seed=seed, drop_last=not pad
        )
        self.share = share
        self.fingerprint = fingerprint
        self.start = 0
        self.period: int | None = None

    def seek(self, epoch: int, batch: int, period: int | None = None) -> None:
        """Lets the next iteration yield epoch ``epoch`` from its micro-step ``batch`` on.

        Args:
            epoch: selects the order.
            batch: micro-steps to skip.
            period: go on with the next epoch, and so on, after this many micro-steps of each; None: end with it.
        """
        self.epoch, self.start, self.period = epoch, batch, period

    def set_epoch(self, epoch: int) -> None:
        """Selects the epoch to yield; another one than the present starts at its first micro-step."""
        if epoch != self.epoch:
            self.seek(epoch, 0)

    def __len__(self) -> int:
        """Micro-steps of a whole epoch, also when the iteration starts in its middle."""
        size, batch = len(self.dataset), self.share.global_batch_size  # type: ignore[arg-type]
        return size // batch if self.drop_last else -(-size // batch)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, first, period = self.epoch, self.start, self.period
        self.start = 0
        yield from self._epoch(epoch, first, period or len(self))
        while period is not None:
            epoch += 1
            yield from self._epoch(epoch, 0, period)

    def _epoch(self, epoch: int, first: int, end: int) -> Iterator[list[int]]:
        order, batch = self._order(epoch), self.share.global_batch_size
        for step in range(first, end):
            yield order[step * batch : (step + 1) * batch][self.share.slice].tolist()

    def _order(self, epoch: int) -> np.ndarray:
        size, batch = len(self.dataset), self.share.global_batch_size  # type: ignore[arg-type]
        order = sample_order(size, self.seed, epoch, self.fingerprint) if self.shuffle else np.arange(size)
        return order if self.drop_last else np.pad(order, (0, -size % batch), constant_values=PADDING)


class FixedBatchSampler(GlobalBatchSampler, SequentialSampler):  # type: ignore[misc]
    """The same samples in the same order in every epoch.

    A ``SequentialSampler`` too, so that Lightning's ``overfit_batches`` keeps it.
    """

    def _order(self, epoch: int) -> np.ndarray:
        return super()._order(0)

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: every epoch is alike."""


class LengthGroupedSampler(GlobalBatchSampler):
    """Global batches of samples of about one length, in an order that tells nothing of it.

    Of every ``window`` global batches of an epoch's order the samples are sorted by length and divided into batches
    anew, whose order is then drawn.

    Args:
        dataset, share, seed, fingerprint: as of :class:`GlobalBatchSampler`.
        lengths: [size], a length of each sample, or its class.
        window: global batches.
    """

    def __init__(
        self,
        dataset: Dataset,
        share: Share,
        lengths: np.ndarray,
        seed: int = 0,
        fingerprint: str = "",
        window: int = 64,
    ) -> None:
        super().__init__(dataset, share, seed, fingerprint)
        self.lengths, self.window = lengths, window

    def _order(self, epoch: int) -> np.ndarray:
        batch = self.share.global_batch_size
        order = super()._order(epoch)[: len(self) * batch]
        for start in range(0, len(order), self.window * batch):
            part = order[start : start + self.window * batch]
            part[:] = part[np.argsort(self.lengths[part], kind="stable")]
        batches = sample_order(len(self), self.seed, epoch, f"batches of {self.fingerprint}")
        return order.reshape(len(self), batch)[batches].ravel()
