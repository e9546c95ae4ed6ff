"""``TokenDataModule``: samples of tokens, in an order that no layout changes, resumable to the sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from lightning_tex.data.loader import ResumableLoader, loader_cursor
from lightning_tex.data.order import FixedBatchSampler, GlobalBatchSampler, Share
from lightning_tex.data.packing import Batch, Samples
from lightning_tex.data.prepared import Prepared, Preparing, default_cache_dir
from lightning_tex.data.resume import Cursor, check_same, check_tokenizer, trainer_cursor
from lightning_tex.data.tokenizer import tokenizer_file, vocabulary
from lightning_tex.parallel.errors import UserValueError


class TokenDataModule(LightningDataModule):
    """Serves batches of prepared samples. What they are of is a subclass's :class:`Preparing`.

    A batch is a dict of int64 tensors with ``input_ids [b, S]``, ``labels [b, S]`` (-100: nothing is predicted) and
    ``sample [b]`` (-1 in rows of padding), b = global_batch_size / data ranks.

    Which samples a micro-step holds depends on ``seed``, epoch and data only, not on the layout or the workers.
    Training leaves out the last incomplete global batch of an epoch; validation and test read every sample, and are
    filled up with rows of padding so that all ranks have equally many batches. A checkpoint holds the position of the
    next sample: a run resumed anywhere in an epoch, also on a data axis of another size, reads exactly what it would
    have read.

    Args:
        preparation: where the samples come from.
        vocab_size: to build the model with.
        sequence_length: S, tokens a sample predicts at most.
        global_batch_size: sequences of one micro-step over the whole data axis.
        seed: of the sample order.
        num_workers: processes that read ahead.
        num_proc: processes that prepare; None: as many as there are processors.
        cache_dir: of prepared data; None: the default.

    Raises:
        ValueError: sizes that are not legal.
    """

    def __init__(
        self,
        preparation: Preparing,
        vocab_size: int,
        sequence_length: int,
        global_batch_size: int,
        seed: int,
        num_workers: int,
        num_proc: int | None,
        cache_dir: str | None,
    ) -> None:
        super().__init__()
        if sequence_length < 1:
            raise UserValueError(f"sequence_length={sequence_length} must be at least 1")
        if num_workers < 0:
            raise UserValueError(f"num_workers={num_workers}; legal: 0, or a number of processes")
        if num_proc is not None and num_proc < 1:
            raise UserValueError(f"num_proc={num_proc} must be at least 1, or left out")
        Share(global_batch_size)
        self._preparation: Any = preparation
        self._vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.num_proc = num_proc
        self.document_mask = False  # whether documents of one row do not see each other
        self._cache_dir = cache_dir
        self._prepared: Any = None
        self._loaded: dict[str, Any] | None = None  # a checkpoint's state that no loader has taken over yet
        self._cursor: Cursor | None = None
        self._cursor_trainer: Any = None

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary to build the model with; larger than every token id. Known before the data is read."""
        return self._vocab_size

    @property
    def end_of_document_id(self) -> int:
        """The token that ends a document. Needs prepared data."""
        return self.prepared.tokenizer.end_of_document_id

    @property
    def prepared(self) -> Prepared:
        """The prepared data; prepared now if need be."""
        if self._prepared is None:
            self.setup()
        prepared: Prepared = self._prepared
        return prepared

    def vocabulary(self) -> dict[str, int] | None:
        """Every token with its number, before the data is prepared; ``None``: a tokenizer is still to be trained."""
        if self._preparation.tokenizer is not None:
            return vocabulary(tokenizer_file(self._preparation.tokenizer))
        prepared: Prepared | None = self._prepared or self._preparation.open(self._cache_dirs()[0])
        return None if prepared is None else prepared.tokenizer.tokenizer.get_vocab(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        return self.prepared.tokenizer.encode(text)

    def decode(self, ids: list[int] | torch.Tensor) -> str:
        """The text of some tokens, e.g. of a row of a batch."""
        return self.prepared.tokenizer.decode(ids.tolist() if isinstance(ids, torch.Tensor) else ids)

    def prepare_data(self) -> None:
        """Fills the cache; Lightning calls it in one process per node. Several runs may do so at the same time."""
        self._preparation.run(*self._cache_dirs(), self.num_proc)

    def setup(self, stage: str | None = None) -> None:
        """Opens the cache, and fills it first where :meth:`prepare_data` has not been called."""
        self._share()  # a wrong batch size is told before the data is read
        if self._prepared is None:
            cache_dir, hub_cache_dir = self._cache_dirs()
            prepared = self._preparation.open(cache_dir)
            self._prepared = prepared or self._preparation.run(cache_dir, hub_cache_dir, self.num_proc)
            if (smallest := self._prepared.tokenizer.size) > self.vocab_size:
                raise UserValueError(f"vocab_size={self.vocab_size} is too small; legal are {smallest} and more")
        if self._loaded is not None:
            check_tokenizer(self._loaded, self._identity())

    def train_dataloader(self) -> ResumableLoader:
        """Loader of this data rank's training batches."""
        share = self._share()
        if self._loaded is not None:
            check_same(self._loaded, self._identity())
        loader = self._train_loader(share)
        loader.cursor = self._cursor = self._cursor_of(loader)
        return loader

    def val_dataloader(self) -> DataLoader:
        """Loader of this data rank's share of all held-out samples, in their order."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader:
        """Loader of the test split's samples, or of the held-out ones if there is no test split."""
        return self._evaluation_loader("validation" if self.prepared.test is None else "test")

    def predict_dataloader(self) -> DataLoader:
        """Loader of the held-out samples; match predictions to samples by the batch's ``sample``."""
        return self._evaluation_loader("validation")

    def state_dict(self) -> dict[str, Any]:
        """Where training stands and on what: small, and the same on all ranks."""
        if self._loaded is not None:
            return self._loaded
        epoch, batch = (0, 0) if self._cursor is None else self._cursor.position()
        return {"epoch": epoch, "samples": batch * self.global_batch_size, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lets the next training loader go on where the state was taken.

        Raises:
            ValueError: the tokenizer is another one. When training starts: the data set, the seed or, within an epoch,
                the batch size is.
        """
        if self._prepared is not None:
            check_tokenizer(state_dict, self._identity())
        if self.trainer is None or self.trainer.state.fn in (None, TrainerFn.FITTING):
            self._loaded = dict(state_dict)

    def alike_on_all_ranks(self) -> dict[str, Any]:
        """What every rank of a run must have alike, for the strategy's comparison; a module of your own may say it."""
        return {**self._identity(), "vocab_size": self.vocab_size}

    def _identity(self) -> dict[str, Any]:
        return {
            "global_batch_size": self.global_batch_size,
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "tokenizer_fingerprint": self.prepared.tokenizer.fingerprint,
            "dataset_fingerprint": self.prepared.fingerprint,
        }

    @property
    def _collate(self) -> Callable[[Any], Batch]:
        """What a loader makes of a batch of samples."""
        return _as_it_is

    def _train_loader(self, share: Share) -> ResumableLoader:
        train = self._enough(self.prepared.train)
        kind = FixedBatchSampler if getattr(self.trainer, "overfit_batches", 0) else GlobalBatchSampler
        return self._resumable(train, kind(train, share, self.seed, self.prepared.fingerprint))

    def _evaluation_loader(self, part: str) -> DataLoader:
        samples = getattr(self.prepared, part)
        return self._loader(samples, FixedBatchSampler(samples, self._share(), shuffle=False, pad=True))

    def _resumable(self, train: Samples, sampler: GlobalBatchSampler) -> ResumableLoader:
        return ResumableLoader(train, sampler, self.num_workers, _pin_memory(), collate_fn=self._collate)

    def _loader(self, samples: Samples, sampler: GlobalBatchSampler) -> DataLoader:
        options: dict[str, Any] = {"num_workers": self.num_workers, "pin_memory": _pin_memory()}
        return DataLoader(samples, sampler=sampler, batch_size=None, collate_fn=self._collate, **options)

    def _cursor_of(self, loader: ResumableLoader) -> Cursor:
        """The cursor a new loader follows: the checkpoint's, that of the Trainer's earlier loader, or a new one."""
        state, self._loaded = self._loaded, None
        trainer, previous = self.trainer, self._cursor
        if trainer is not None and state is None and previous is not None and self._cursor_trainer is trainer:
            return previous
        self._cursor_trainer = trainer
        epoch, batch = (state["epoch"], state["samples"] // self.global_batch_size) if state else (0, 0)
        return self._new_cursor(loader, epoch, batch)

    def _new_cursor(self, loader: ResumableLoader, epoch: int, batch: int) -> Cursor:
        """A cursor that stands at a micro-step of an epoch."""
        trainer = self.trainer
        return trainer_cursor(trainer, epoch, batch) if trainer is not None else loader_cursor(loader, epoch, batch)

    def _enough(self, train: Samples | None) -> Samples:
        assert train is not None
        if len(train) < self.global_batch_size:
            raise UserValueError(self._too_few(len(train)))
        return train

    def _too_few(self, samples: int) -> str:
        """What is said of fewer training samples than one global batch has."""
        return (
            f"global_batch_size={self.global_batch_size} is more than the {samples} training samples; legal are 1 to "
            f"{samples}, or more data"
        )

    def _share(self) -> Share:
        options = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return Share(self.global_batch_size, **(options or {}))

    def _cache_dirs(self) -> tuple[Path, Path | None]:
        if self._cache_dir is None:
            return default_cache_dir(), None
        folder = Path(self._cache_dir).expanduser()
        return folder, folder / "downloads"


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _pin_memory() -> bool:
    return torch.cuda.is_available()
