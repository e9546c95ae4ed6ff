"""What ``predict_step`` returns, kept in files: each data rank writes its own, and one call reads all in order."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_tex.parallel.errors import UserFileError, UserValueError

_NAME = "predictions-{rank}-of-{ranks}-{part:05d}.pt"
_PART_BYTES = 256 << 20


class PredictionWriter(BasePredictionWriter):
    """Write predictions of every batch to a folder; :func:`read_predictions` gives them in the order of samples.

    Ranks of one tensor group predict alike, and the first of them writes. Predictions leave the device and, a file
    of some size at a time, memory: with ``trainer.predict(return_predictions=False)`` none are kept. What an earlier
    run has left in the folder is replaced.

    Args:
        folder: seen by all ranks that are to be read together.
        part_bytes: of tensors, after which a rank begins another file.

    Raises:
        ValueError: ``part_bytes`` below 1.
    """

    def __init__(self, folder: str | os.PathLike[str], part_bytes: int = _PART_BYTES) -> None:
        super().__init__(write_interval="batch")
        if part_bytes < 1:
            raise UserValueError(f"part_bytes={part_bytes}; legal: 1 or more")
        self.folder, self.part_bytes = Path(folder), part_bytes
        self._kept: list[dict[str, Any]] = []
        self._bytes = self._part = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._kept, self._bytes, self._part = [], 0, 0
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in _files(self.folder):
                path.unlink()
        trainer.strategy.barrier()

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        samples = list(batch_indices or ())
        trainer.predict_loop.current_batch_indices = []  # or the next loader's batches, if not known, would have these
        if not _writes(trainer):
            return
        held = apply_to_collection(prediction, Tensor, lambda tensor: tensor.detach().cpu())
        self._kept.append({"loader": dataloader_idx, "batch": batch_idx, "samples": samples, "prediction": held})
        apply_to_collection(held, Tensor, self._count)
        if self._bytes >= self.part_bytes:
            self._write(trainer)

    def _count(self, tensor: Tensor) -> None:
        self._bytes += tensor.nbytes

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._kept:
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        place = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        name = _NAME.format(rank=place["rank"], ranks=place["num_replicas"], part=self._part)
        torch.save(self._kept, self.folder / name)
        self._kept, self._bytes, self._part = [], 0, self._part + 1


def read_predictions(folder: str | os.PathLike[str]) -> list[list[Any]]:
    """What :class:`PredictionWriter` has written, of each data loader.

    Args:
        folder: the writer's.

    Returns:
        of each data loader its samples' predictions, in the order of its data set: rows of tensors, in the containers
        that ``predict_step`` returns. Where samples are not known (a loader without a batch sampler) or have no rows,
        it is batches as they were returned, in the order in which ranks would take turns.

    Raises:
        FileNotFoundError: there are none.
    """
    records: dict[int, list[tuple[int, dict[str, Any]]]] = {}
    for path in _files(Path(folder)):
        rank = int(path.name.split("-")[1])
        for record in torch.load(path, weights_only=True):
            records.setdefault(record["loader"], []).append((rank, record))
    if not records:
        raise UserFileError(f"there are no predictions in {folder}; legal: the folder of a PredictionWriter")
    return [_in_order(records[loader]) for loader in sorted(records)]


def _in_order(records: Sequence[tuple[int, dict[str, Any]]]) -> list[Any]:
    in_turns = sorted(records, key=lambda one: (one[1]["batch"], one[0]))
    if not all(record["samples"] and _has_rows(record) for _, record in in_turns):
        return [record["prediction"] for _, record in in_turns]
    by_sample: dict[int, Any] = {}
    for _, record in in_turns:
        for row, sample in enumerate(record["samples"]):
            by_sample.setdefault(sample, _row(record["prediction"], row))  # a sampler may repeat some to fill ranks
    return [by_sample[sample] for sample in sorted(by_sample)]


def _has_rows(record: Mapping[str, Any]) -> bool:
    lengths = {len(tensor) if tensor.dim() else -1 for tensor in _tensors(record["prediction"])}
    return lengths == {len(record["samples"])}


def _tensors(prediction: Any) -> Iterator[Tensor]:
    found: list[Tensor] = []
    apply_to_collection(prediction, Tensor, found.append)
    yield from found


def _row(prediction: Any, row: int) -> Any:
    return apply_to_collection(prediction, Tensor, lambda tensor: tensor[row].clone())


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("predictions-*-of-*-*.pt"))


def _writes(trainer: Trainer) -> bool:
    topology = getattr(trainer.strategy, "topology", None)
    return topology is None or topology.tensor.rank == 0
