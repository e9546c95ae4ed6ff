"""``on_data_axis``: a user's own data set or loader, in exact order, resumable, shared by data ranks.

G samples in a micro-step over the whole data axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, default_collate

from lightning_tex.data.loader import ResumableLoader, loader_cursor
from lightning_tex.data.order import GlobalBatchSampler, Share
from lightning_tex.data.own_samples import EverySample, Items, Picked
from lightning_tex.data.resume import Positions, trainer_cursor
from lightning_tex.data.workers import end_workers
from lightning_tex.parallel.errors import UserValueError

_TAKEN_OVER = [
    *("num_workers", "collate_fn", "pin_memory", "timeout"),
    *("worker_init_fn", "multiprocessing_context", "prefetch_factor"),
]


def on_data_axis(
    source: DataLoader | Dataset,
    global_batch_size: int | None = None,
    shuffle: bool | None = None,
    seed: int = 0,
    evaluation: bool = False,
    trainer: Trainer | None = None,
    **options: Any,
) -> DataAxisLoader:
    """A loader whose samples and their order are the same on every layout, and which resumes at the next sample.

    A micro-step has G samples over the whole data axis, of which every data rank gets a contiguous part. With
    ``TexMoEStrategy`` the loader is told its rank and what has been trained on; so return it from a module's
    ``train_dataloader`` or ``val_dataloader``, or give it to ``Trainer.fit``. Elsewhere ranks are those of
    ``torch.distributed``, and ``trainer`` tells what has been trained on; a loop without one trains on what it fetches.

    A data set with ``len`` is read in an order of its own for each epoch, a function of the seed and the epoch. An
    iterable one is read as it is, by every data rank, of which each keeps its samples; its ``set_epoch``, if it has
    one, is called. Resuming reads over what was trained on, or uses its
    ``state_dict`` and ``load_state_dict``; not those of a stream of ``datasets`` with a shuffle buffer, which is not
    resumed exactly.

    Args:
        source: a data set; or a ``DataLoader`` of one, whose ``batch_size`` is G, and whose ``collate_fn``, workers and
            order, shuffled or not, are taken over.
        global_batch_size: G, where the source is a data set.
        shuffle: whether epochs are shuffled. None: as the loader does; of a data set, unless it is for evaluation.
        seed: of the shuffle.
        evaluation: read every sample, in the same order always; a rank whose part of the last micro-step is empty ends
            before it. False: an epoch's last micro-step is left out where there are too few samples for it.
        trainer: the module's, without which only ``TexMoEStrategy`` resumes exactly.
        options: of a ``DataLoader``, where the source is a data set. Workers begin anew with each epoch.

    Raises:
        ValueError: a loader whose samples are drawn in another way, or options that are not legal.
    """
    if isinstance(source, DataLoader):
        if global_batch_size is not None or options:
            raise UserValueError("a DataLoader has its batch_size and options; legal: none here, or a data set")
        options = {name: getattr(source, name) for name in _TAKEN_OVER}
        global_batch_size, shuffle = _batch_size(source), _shuffles(source) if shuffle is None else shuffle
        source = source.dataset
    if global_batch_size is None:
        raise UserValueError("global_batch_size is needed with a data set: samples of one micro-step over all ranks")
    if not options.keys() <= set(_TAKEN_OVER):
        wrong = ", ".join(f"{name}={options[name]!r}" for name in options if name not in _TAKEN_OVER)
        raise UserValueError(f"{wrong} of data on the data axis; legal options are {', '.join(_TAKEN_OVER)}")
    shuffle = not evaluation if shuffle is None else shuffle
    return DataAxisLoader(source, Share(global_batch_size), shuffle, seed, evaluation, options, trainer)


def _too_few(share: Share, samples: int | None = None) -> UserValueError:
    there = "an iterable data set has" if samples is None else f"the {samples}"
    return UserValueError(
        f"global_batch_size={share.global_batch_size} is more than {there} samples: there is no micro-step to train "
        "on; legal: a smaller one, or more data"
    )


def _batch_size(loader: DataLoader) -> int:
    if loader.batch_size is None:
        raise UserValueError("a DataLoader with a batch_sampler, or without batch_size; legal: batch_size=G")
    return loader.batch_size


def _shuffles(loader: DataLoader) -> bool:
    if isinstance(loader.dataset, IterableDataset):
        return False
    if type(loader.sampler) not in (RandomSampler, SequentialSampler):
        raise UserValueError(
            f"a DataLoader with a {type(loader.sampler).__name__}, whose order is not known on other layouts; legal: "
            "shuffle=True or False, or an IterableDataset that draws the samples"
        )
    return isinstance(loader.sampler, RandomSampler)


class DataAxisLoader(ResumableLoader):
    """What :func:`on_data_axis` makes.

    Args:
        dataset: the user's.
        share: G and the place on the data axis.
        shuffle, seed, evaluation, options, trainer: as there.
    """

    def __init__(
        self,
        dataset: Any,
        share: Share,
        shuffle: bool,
        seed: int,
        evaluation: bool,
        options: dict[str, Any],
        trainer: Trainer | None = None,
    ) -> None:
        collate = options.pop("collate_fn", None) or default_collate
        self.evaluation, self.trainer, self._placed = evaluation, trainer, False
        self._facts: dict[str, Any] = {"global_batch_size": share.global_batch_size}
        if isinstance(dataset, IterableDataset):
            options["num_workers"] = min(1, options.get("num_workers") or 0)
            if not options["num_workers"]:
                options.pop("prefetch_factor", None)
            super().__init__(Items(dataset, share, collate, evaluation), None, collate_fn=_as_it_is, **options)  # type: ignore[arg-type]
        else:
            picked, kind = Picked(dataset, collate), EverySample if evaluation else GlobalBatchSampler
            sampler = kind(picked, share, seed, shuffle=shuffle, pad=evaluation)
            if not evaluation and len(picked) < share.global_batch_size:
                raise _too_few(share, len(picked))
            self._facts |= {"seed": seed, "shuffle": shuffle, "samples": len(picked)}
            super().__init__(picked, sampler, collate_fn=_as_it_is, **options)  # type: ignore[arg-type]
        self._positions = Positions(0, None)
        self._stand(0, 0)

    def place(self, share: dict[str, int], trainer: Any) -> None:
        """Take a rank's place, in a Trainer's run.

        Args:
            share: ``num_replicas`` and ``rank`` on the data axis.
            trainer: whose finished steps count.
        """
        self.order.share = Share(self._facts["global_batch_size"], **share)
        self._placed = True
        if trainer is not self.trainer:
            self.trainer = trainer
            self._stand(trainer.current_epoch, 0)

    def __len__(self) -> int:
        self._find_place()
        return super().__len__()

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._find_place()
        if self.evaluation:
            self.order.seek(self.order.epoch, 0)
            yield from (batch for batch, _ in self._read())
            return
        assert self.cursor is not None
        epoch, step = self.cursor.begin()
        self.order.seek(epoch, step, self.cursor.period())
        if isinstance(self.order, Items):
            self.order.state = self._state_before(step)
            self._positions = Positions(step, self.order.state)
        for batch, state in self._read():
            step += 1
            self.batches_fetched += 1
            if isinstance(self.order, Items):
                self._positions.add(step, state, self.cursor.position()[1])
            yield batch
        if not step:
            raise _too_few(self.order.share)
        self.cursor.run_out(step)

    def _read(self) -> Iterator[tuple[Any, Any]]:
        batches = DataLoader.__iter__(self)
        try:
            yield from batches
        finally:
            end_workers(batches)

    def state_dict(self) -> dict[str, Any]:
        """Epoch and micro-step to go on with, and what they are of."""
        position = super().state_dict()
        return {**position, **self._facts, "state": self._state_before(position["batch"])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: the state is of other data, or of another order.
        """
        for name, now in self._facts.items():
            if state[name] != now:
                raise UserValueError(
                    f"{name}={now} of the data on the data axis, and the checkpoint was trained with {name}="
                    f"{state[name]}; only the latter continues with the next sample"
                )
        self._stand(state["epoch"], state["batch"])
        self._positions = Positions(state["batch"], state["state"])

    def _state_before(self, step: int) -> Any:
        """Of an iterable data set that has one, in the present epoch."""
        return self._positions.before(step) if self._positions.has(step) else None

    def _stand(self, epoch: int, batch: int) -> None:
        trainer = self.trainer
        self.cursor = loader_cursor(self, epoch, batch) if trainer is None else trainer_cursor(trainer, epoch, batch)

    def _find_place(self) -> None:
        if not self._placed and dist.is_available() and dist.is_initialized():
            self.order.share = Share(self._facts["global_batch_size"], dist.get_world_size(), dist.get_rank())


def _as_it_is(batch: Any) -> Any:
    return batch
