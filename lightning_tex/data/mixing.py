"""Mixtures: samples of several sources, and which one a sample is from, as a function of the seed and the micro-step.

G samples in a micro-step, K sources. The samples of a micro-step are divided over the sources by systematic sampling:
of the points 1 - u, 2 - u, .., G - u in [0, G], u in [0, 1) drawn for the micro-step, a source gets those in its part
of that length, which is G times its weight. So it has its share in every micro-step up to one sample, and in the mean
exactly. The samples of one source are drawn in the order of its own epochs, one behind the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lightning_tex.data.order import PADDING, FixedBatchSampler, GlobalBatchSampler, Share, hashed, sample_order
from lightning_tex.data.packing import Batch, Samples
from lightning_tex.parallel.errors import UserValueError

Weight = float | dict[int, float]
_AT_ONCE = 1 << 16  # micro-steps


class Weights:
    """Shares of sources, constant or by micro-step.

    Args:
        weights: of each source: a number, or numbers at some micro-steps, between which it is interpolated.

    Raises:
        ValueError: a weight below 0, or all of them 0 at some micro-step.
    """

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self.points = {name: _points(name, weight) for name, weight in weights.items()}
        steps = sorted({step for points in self.points.values() for step in points})
        empty = np.array(steps)[self._raw(np.array(steps)).sum(1) <= 0]
        if len(empty):
            raise UserValueError(f"the weights of all sources are 0 at micro-step {empty[0]}; legal: one above 0")

    def shares(self, steps: np.ndarray) -> np.ndarray:
        """[micro-steps, K], sums of 1."""
        raw = self._raw(steps)
        return raw / raw.sum(1, keepdims=True)

    def _raw(self, steps: np.ndarray) -> np.ndarray:
        return np.stack([np.interp(steps, list(p), list(p.values())) for p in self.points.values()], 1)


def _points(name: str, weight: Weight) -> dict[int, float]:
    points = dict(sorted(weight.items())) if isinstance(weight, dict) else {0: weight}
    if not points or min(points) < 0 or not all(0 <= value < math.inf for value in points.values()):
        raise UserValueError(f"weight={weight!r} of source {name!r}; legal: 0 or more, or such by micro-step")
    return points


class Mixture(Samples):
    """Samples of several sources; those of one are consecutive indices.

    The index ``-1 - k`` is a row of padding of source k.

    Args:
        sources: by name.
    """

    def __init__(self, sources: Mapping[str, Samples]) -> None:
        self.names, self.sources = list(sources), list(sources.values())
        self.starts = np.cumsum([0, *map(len, self.sources)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __str__(self) -> str:
        return "; ".join(f"{name}: {samples}" for name, samples in zip(self.names, self.sources, strict=True))

    def __getitem__(self, samples: list[int]) -> Batch:
        indices = np.array(samples)
        of = np.where(indices < 0, -1 - indices, np.searchsorted(self.starts, indices, side="right") - 1)
        own = np.where(indices < 0, PADDING, indices - self.starts[of])
        batch: Batch = {}
        for source in np.unique(of):
            rows = torch.from_numpy(np.flatnonzero(of == source))
            part = self.sources[source][own[of == source].tolist()]
            for name, values in part.items():
                batch.setdefault(name, values.new_zeros((len(samples), *values.shape[1:])))[rows] = values
        return {**batch, "sample": torch.from_numpy(np.where(indices < 0, PADDING, indices))}


class NamedMixture(Mixture):
    """The same, whose batches say which source they are of; all samples of a batch are of one."""

    def __getitem__(self, samples: list[int]) -> Any:
        first = samples[0]
        source = -1 - first if first < 0 else int(np.searchsorted(self.starts, first, side="right")) - 1
        return {**super().__getitem__(samples), "source": self.names[source]}


class MixtureSampler(GlobalBatchSampler):
    """Yields, micro-step by micro-step, a data rank's samples of a mixture.

    Epochs of a run follow one another: a source begins its next one when it has been read, wherever the run is.

    Args:
        mixture: of sources.
        share: G and the place on the data axis.
        weights: of the sources.
        seed: of the shuffles.
        fingerprints: of the sources, which enter their shuffles.
    """

    def __init__(
        self, mixture: Mixture, share: Share, weights: Weights, seed: int, fingerprints: Sequence[str]
    ) -> None:
        super().__init__(mixture, share, seed)
        self.mixture, self.weights, self.fingerprints = mixture, weights, list(fingerprints)
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def drawn(self, step: int) -> np.ndarray:
        """[K], samples of each source before micro-step ``step`` of the run."""
        total = np.zeros(len(self.fingerprints), np.int64)
        for first in range(0, step, _AT_ONCE):
            total += self._counts(np.arange(first, min(first + _AT_ONCE, step))).sum(0)
        return total

    def _epoch(self, epoch: int, first: int, end: int) -> Iterator[list[int]]:
        # Lightning's epochs are of `end` micro-steps, which may be fewer than len(self).
        start = epoch * end
        drawn = self.drawn(start + first)
        for step in range(start + first, start + end):
            counts = self._counts(np.array([step]))[0]
            parts = [self._draw(k, int(drawn[k]), int(count)) for k, count in enumerate(counts)]
            drawn += counts
            order = np.argsort(hashed(np.arange(self.share.global_batch_size), f"{self.seed}/rows/{step}"))
            yield np.concatenate(parts)[order][self.share.slice].tolist()

    def _counts(self, steps: np.ndarray) -> np.ndarray:
        """[micro-steps, K], samples of each source."""
        size = self.share.global_batch_size
        u = (hashed(steps, f"{self.seed}/sources") >> np.uint64(11)).astype(np.float64) / 2**53
        ends = np.cumsum(self.weights.shares(steps), 1) * size
        ends[:, -1] = size
        points = np.floor(ends + u[:, None]).astype(np.int64)  # those before each end
        return np.diff(points, axis=1, prepend=0)

    def _draw(self, source: int, first: int, count: int) -> np.ndarray:
        """Indices of ``count`` samples of a source from its ``first`` one on, counted over its epochs."""
        size = len(self.mixture.sources[source])
        drawn = np.arange(first, first + count)
        epochs = np.unique(drawn // size).tolist()
        parts = [self._order_of(source, epoch)[drawn[drawn // size == epoch] % size] for epoch in epochs]
        return np.concatenate([np.empty(0, np.int64), *parts]) + self.mixture.starts[source]

    def _order_of(self, source: int, epoch: int) -> np.ndarray:
        if (source, epoch) not in self._orders:
            self._orders.pop((source, epoch - 2), None)
            size = len(self.mixture.sources[source])
            self._orders[source, epoch] = sample_order(size, self.seed, epoch, self.fingerprints[source])
        return self._orders[source, epoch]


class BySource(FixedBatchSampler):
    """All samples of a mixture, source by source, each filled up to whole global batches."""

    def __init__(self, mixture: Mixture, share: Share) -> None:
        super().__init__(mixture, share, shuffle=False, pad=True)
        size = share.global_batch_size
        parts = [
            np.pad(np.arange(start, end), (0, -(end - start) % size), constant_values=-1 - source)
            for source, (start, end) in enumerate(zip(mixture.starts[:-1], mixture.starts[1:], strict=True))
        ]
        self._samples = np.concatenate(parts)

    def __len__(self) -> int:
        return len(self._samples) // self.share.global_batch_size

    def _order(self, epoch: int) -> np.ndarray:
        return self._samples
