"""Batches to trace a micro-step with, of any number of samples: made up, or grown from a few of a loader's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_tex.parallel.errors import UserValueError

_SAMPLES = 4  # of a data set, that are looked at


class Batches(ABC):
    """Where the batch of a traced micro-step comes from."""

    @abstractmethod
    def of(self, samples: int, sequence_length: int) -> Any:
        """One batch of so many samples; new tensors.

        Args:
            samples: sequences, where samples are sequences of tokens.
            sequence_length: tokens of each, where it is not the data's alone.
        """


def token_blocks(vocab_size: int, samples: int, length: int, documents: bool = False) -> dict[str, Tensor]:
    """Blocks of made-up tokens, as a :class:`TokenDataModule` gives them, each of one document or of two.

    Of two the first has one token: what is kept of several documents is most where one of them is long.
    """
    tokens = torch.arange(samples * (length + 1)).view(samples, -1) % vocab_size
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    batch = {"input_ids": inputs, "labels": labels, "sample": torch.arange(samples)}
    return {**batch, "segments": (torch.arange(length) > 0).long().repeat(samples, 1)} if documents else batch


@dataclass(frozen=True)
class TokenBlocks(Batches):
    """Blocks of made-up tokens.

    Args:
        vocab_size: tokens are below it.
        documents: there are documents in a block, which do not see each other.
    """

    vocab_size: int
    documents: bool = False

    def of(self, samples: int, sequence_length: int) -> dict[str, Tensor]:
        return token_blocks(self.vocab_size, samples, sequence_length, self.documents)


@dataclass(frozen=True)
class GrownBatch(Batches):
    """A batch as it was read, repeated or cut along the first dims of its tensors.

    Args:
        batch: what a loader's ``collate_fn`` made.
        samples: of how many.
    """

    batch: Any
    samples: int

    def of(self, samples: int, sequence_length: int) -> Any:
        return apply_to_collection(self.batch, Tensor, self._grown, samples)

    def _grown(self, tensor: Tensor, samples: int) -> Tensor:
        if not tensor.dim() or len(tensor) % self.samples:
            return tensor.clone()
        length = len(tensor) // self.samples * samples
        if tensor.is_floating_point():
            return torch.empty((length, *tensor.shape[1:]), dtype=tensor.dtype)  # without contents, in a trace
        return tensor[torch.arange(length) % max(1, len(tensor))]


def batches_of(loader: Any, may_iterate: bool) -> GrownBatch:
    """Batches like those of a loader, of which the data set's first samples are read and no random number is taken.

    Args:
        loader: a ``DataLoader``; with ``may_iterate`` anything that gives batches.
        may_iterate: what can be read once only may be read.

    Raises:
        ValueError: there is nothing that may be read.
    """
    with isolate_rng():
        dataset: Any = getattr(loader, "dataset", None)
        if isinstance(loader, DataLoader) and not isinstance(dataset, IterableDataset):
            if loader.batch_sampler is None:
                return _as_it_is(loader.collate_fn(dataset[0]))
            indices = range(min(len(dataset), _SAMPLES))
            return GrownBatch(loader.collate_fn([dataset[i] for i in indices]), len(indices))
        if not may_iterate:
            raise UserValueError("its data can only be iterated over, which would take a batch from the training")
        for batch in loader:
            return _as_it_is(batch)
    raise UserValueError("its training data are empty")


def _as_it_is(batch: Any) -> GrownBatch:
    lengths: list[int] = []
    apply_to_collection(batch, Tensor, lambda tensor: lengths.append(len(tensor)) if tensor.dim() else None)
    if not lengths or not lengths[0]:
        raise UserValueError("its batches have no tensor from whose first dim the number of samples could be told")
    return GrownBatch(batch, lengths[0])
