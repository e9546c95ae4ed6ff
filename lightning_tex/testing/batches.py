"""Global batches: taken once, in one process, and handed out in slices to the data ranks of any layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_tex.parallel.errors import UserValueError


class Batches(IterableDataset[Any]):
    """Batches that are there already."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def loader(self) -> DataLoader[Any]:
        """A loader that gives them as they are."""
        return DataLoader(self, batch_size=None)


class BatchCollector(Callback):
    """Keeps a copy of every training batch, as the module is given it."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append(mapped(batch, lambda tensor: tensor.detach().cpu().clone()))


def mapped(batch: Any, function: Any) -> Any:
    """A batch with a function applied to each of its tensors."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: mapped(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(mapped(value, function) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(mapped(value, function) for value in batch)
    return batch


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in its order."""
    found: list[Tensor] = []
    mapped(batch, lambda tensor: found.append(tensor))
    return found


def samples_of(batch: Any) -> int:
    """Samples of a batch: the length of the first dim of its tensors; 0 without any."""
    return next((len(tensor) for tensor in tensors_of(batch) if tensor.dim()), 0)


def slice_of(batch: Any, rank: int, ranks: int) -> Any:
    """One data rank's consecutive share of a global batch.

    Raises:
        ValueError: the samples cannot be shared evenly.
    """

    def share(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0:
            return tensor
        if len(tensor) % ranks:
            raise UserValueError(
                f"a batch of {len(tensor)} samples cannot be shared evenly by {ranks} data ranks; legal: a multiple "
                f"of {ranks} samples, or layouts with fewer data ranks"
            )
        return tensor.chunk(ranks)[rank]

    return mapped(batch, share)


def same_samples(batch: Any, other: Any) -> bool:
    """Whether two batches hold the same samples, in any order."""
    mine, theirs = tensors_of(batch), tensors_of(other)
    if [t.shape for t in mine] != [t.shape for t in theirs]:
        return False
    return _sorted_rows(mine) == _sorted_rows(theirs)


def _sorted_rows(tensors: list[Tensor]) -> list[bytes]:
    rows = [t.reshape(len(t), -1).contiguous().view(torch.uint8).numpy() for t in tensors if t.dim()]
    return sorted(b"".join(part.tobytes() for part in row) for row in zip(*rows, strict=False))


def feed(trainer: Trainer, module: LightningModule, data: object, batches: Sequence[Any]) -> None:
    """Fit a module on these batches, whatever its data would give; a data module stays the Trainer's."""
    loader = Batches(batches).loader()
    if isinstance(data, LightningDataModule):
        data.train_dataloader = lambda: loader  # type: ignore[method-assign]
        trainer.fit(module, datamodule=data)
    else:
        trainer.fit(module, train_dataloaders=loader)
