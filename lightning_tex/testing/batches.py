"""Global batches: taken once, in one process, and handed out in slices to the data ranks of any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
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
    """Keeps a copy of every training batch as the loader gives it, before any hook or the Trainer's precision."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        # What Lightning does first with a batch is to convert it to the precision of its inputs.
        convert = trainer.precision_plugin.convert_input

        def keep_and_convert(batch: Any) -> Any:
            self.batches.append(mapped(batch, lambda tensor: tensor.detach().cpu().clone()))
            return convert(batch)

        trainer.precision_plugin.convert_input = keep_and_convert  # type: ignore[method-assign, assignment]


def mapped(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """A batch with a function applied to each of its tensors: in mappings, tuples, lists and dataclasses."""
    return apply_to_collection(batch, Tensor, function)


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in its order."""
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    mapped(batch, note)
    return tensors


def samples_of(batch: Any) -> int:
    """Samples of a batch: the length of the first of its tensors that has a dim; 0 without any."""
    return next((len(tensor) for tensor in tensors_of(batch) if tensor.dim()), 0)


def require_samples(batches: Sequence[Any]) -> None:
    """Refuse data of which no slices can be made.

    Raises:
        UserValueError: there are no batches, or one has no tensors.
    """
    if not batches:
        raise UserValueError("the data gave no batches; legal: at least one batch for training")
    for batch in batches:
        if samples_of(batch) == 0:
            raise UserValueError(
                f"the data gave no batch with tensors but a {type(batch).__name__}; legal: tensors, mappings, tuples, "
                "lists and dataclasses of them"
            )


def slice_of(batch: Any, rank: int, ranks: int) -> Any:
    """One data rank's consecutive share of a global batch.

    Shared are the tensors whose first dim is the samples, as that of the first tensor of the batch; all others, such as
    class weights or a mask for all samples, are handed on whole, and so is what is no tensor.

    Raises:
        UserValueError: the samples cannot be shared evenly.
    """
    samples = samples_of(batch)
    if samples % ranks:
        raise UserValueError(
            f"a batch of {samples} samples cannot be shared evenly by {ranks} data ranks; legal: a multiple of {ranks} "
            "samples, or layouts with fewer data ranks"
        )
    return mapped(batch, lambda tensor: tensor.chunk(ranks)[rank] if _has_samples(tensor, samples) else tensor)


def joined(shares: Sequence[Any]) -> list[Tensor]:
    """The tensors of a global batch, from the slices of all data ranks."""
    samples = samples_of(shares[0])
    columns = zip(*map(tensors_of, shares), strict=True)
    return [torch.cat(column) if _has_samples(column[0], samples) else column[0] for column in columns]


def _has_samples(tensor: Tensor, samples: int) -> bool:
    return tensor.dim() > 0 and len(tensor) == samples


def same_samples(batch: Any, other: Any) -> bool:
    """Whether two batches hold the same samples, in any order."""
    mine, theirs = tensors_of(batch), tensors_of(other)
    if [t.shape for t in mine] != [t.shape for t in theirs]:
        return False
    samples = samples_of(batch)
    return _sorted_rows(mine, samples) == _sorted_rows(theirs, samples)


def _sorted_rows(tensors: list[Tensor], samples: int) -> list[bytes]:
    of_samples = [tensor for tensor in tensors if _has_samples(tensor, samples)]
    rows = [tensor.reshape(samples, -1).contiguous().view(torch.uint8).numpy() for tensor in of_samples]
    return sorted(b"".join(part.tobytes() for part in row) for row in zip(*rows, strict=True))


def feed(trainer: Trainer, module: LightningModule, data: object, batches: Sequence[Any]) -> None:
    """Fit a module on these batches, whatever its data would give; a data module stays the Trainer's."""
    loader = Batches(batches).loader()
    if isinstance(data, LightningDataModule):
        data.train_dataloader = lambda: loader  # type: ignore[method-assign]
        trainer.fit(module, datamodule=data)
    else:
        trainer.fit(module, train_dataloaders=loader)
