"""``TextDataModule``: documents -> tokens -> blocks -> batches, resumable to the sample."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from lightning_tex.data.corpus import Source
from lightning_tex.data.loader import ResumableLoader, loader_cursor
from lightning_tex.data.order import FixedBatchSampler, GlobalBatchSampler, Share
from lightning_tex.data.packing import Batch, Blocks, StreamedBlocks, by_document, unigram_loss
from lightning_tex.data.prepared import Preparation, Prepared, default_cache_dir
from lightning_tex.data.resume import Cursor, check_same, check_tokenizer, trainer_cursor
from lightning_tex.data.tokenizer import SMALLEST_VOCABULARY, TextTokenizer, is_hub_name
from lightning_tex.parallel.errors import UserValueError

DEFAULT_VOCABULARY = 4096


class TextDataModule(LightningDataModule):
    """Text for language models: loads, tokenises and packs it once a node, then serves batches that resume exactly.

    A batch is a dict of int64 tensors: ``input_ids [b, S]``, ``labels [b, S]`` (shifted already: ``labels[:, t]``
    follows ``input_ids[:, t]``; -100 is padding) and ``sample [b]`` (index of the block; -1 in rows of padding), with
    S = sequence_length and b = global_batch_size / data ranks.

    Documents, each followed by an end-of-document token, form one stream that is cut into blocks of S + 1 tokens
    overlapping by one: every token is predicted once. Which samples a micro-step holds depends on ``seed``, epoch and
    data only, not on the layout or the workers. Training leaves out the last incomplete global batch of an epoch;
    validation and test read every block, and are filled up with rows of padding so that all ranks have equally many
    batches (a rank's last batch may be all padding).

    With ``document_mask=True`` a batch has ``segments [b, S]`` besides, the number of a token's document in its block,
    by which :class:`~lightning_tex.LanguageModel` lets documents not see each other, and the first token of a document
    is not predicted: its label, at the end-of-document token before, is -100. Of a document that a block's border cuts
    in two each part is one. Blocks and their order remain the same.

    A checkpoint holds the position of the next sample: a run resumed anywhere in an epoch, also on a data axis of
    another size, reads exactly what it would have read. With ``streaming=True`` that needs the data itself to be
    unchanged, which is not checked; resuming reads and tokenises the stream's first part again, every rank tokenises
    all of it, and ``len`` is unknown (so limit validation with ``limit_val_batches``).

    Args:
        path: what to read, as in ``datasets.load_dataset``: a data set's name, a builder ("text", "json", ...) with
            ``data_files``; or a folder or file of text (.txt, .md, .rst: a document each), .jsonl, .csv or .parquet.
            None: the sources of the running Python's standard library, so that there is real text on every machine.
        name: configuration of the data set.
        data_files: files of a builder, also by split.
        split: what to train on; slices such as "train[:10%]" are legal unless streaming.
        validation_split: what to validate on. None: the split "validation", or held-out documents if there is none.
        test_split: what to test on. None: the validation blocks.
        validation_fraction: share of the documents held out, every n-th one.
        streaming: do not download; tokenise and pack while reading.
        shuffle_buffer: documents in the shuffle buffer of a stream; 0: in the stream's order.
        text_column: column that holds the text.
        tokenizer: a ``tokenizers`` JSON file, a folder with ``tokenizer.json``, or a repository of the Hugging Face hub
            that has one, ``owner/name``. None: train a byte-level BPE.
        vocab_size: tokens of the BPE (default 4096), or a size to which that of ``tokenizer`` is padded. Given for a
            tokenizer of the hub, that is downloaded only when the data is prepared.
        end_of_document: the token that ends a document. None: the first the tokenizer has of the usual ones.
        sequence_length: tokens a sample predicts.
        global_batch_size: sequences of one micro-step over the whole data axis.
        seed: of the sample order.
        num_workers: processes that read ahead.
        max_bytes: size of the standard library's selection, bytes.
        cache_dir: of prepared data. None: ``$LIGHTNING_TEX_CACHE``, else ``lightning_tex`` in ``$XDG_CACHE_HOME`` or
            ``~/.cache``. Downloads go where ``datasets`` keeps them unless this is set.
        document_mask: documents of one block do not see each other. A text that spells the end-of-document token out
            ends a document there.

    Raises:
        ValueError: options that contradict each other or the data, naming what is legal.
        FileNotFoundError: no such tokenizer or data.
    """

    def __init__(
        self,
        path: str | None = None,
        name: str | None = None,
        data_files: str | list[str] | dict[str, str | list[str]] | None = None,
        split: str = "train",
        validation_split: str | None = None,
        test_split: str | None = None,
        validation_fraction: float = 0.05,
        streaming: bool = False,
        shuffle_buffer: int = 0,
        text_column: str = "text",
        tokenizer: str | None = None,
        vocab_size: int | None = None,
        end_of_document: str | None = None,
        sequence_length: int = 128,
        global_batch_size: int = 8,
        seed: int = 0,
        num_workers: int = 0,
        max_bytes: int = 3_000_000,
        cache_dir: str | None = None,
        document_mask: bool = False,
    ) -> None:
        super().__init__()
        if sequence_length < 1:
            raise UserValueError(f"sequence_length={sequence_length} must be at least 1")
        if shuffle_buffer and not streaming:
            raise UserValueError(
                f"shuffle_buffer={shuffle_buffer} needs streaming=True; other data is shuffled as a whole"
            )
        Share(global_batch_size)
        source = Source(
            str(path) if path is not None else None, name, data_files, split, validation_split, test_split,
            validation_fraction, text_column, streaming, max_bytes,
        )  # fmt: skip
        self._vocab_size = _vocab_size(tokenizer, vocab_size, end_of_document)
        self._preparation = Preparation(
            source, None if tokenizer is None else str(tokenizer), self._vocab_size, end_of_document, sequence_length
        )
        self.sequence_length = sequence_length
        self.global_batch_size = global_batch_size
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.num_workers = num_workers
        self.document_mask = document_mask
        self._cache_dir = cache_dir
        self._prepared: Prepared | None = None
        self._loaded: dict[str, Any] | None = None  # a checkpoint's state that no loader has taken over yet
        self._cursor: Cursor | None = None
        self._cursor_trainer: Any = None

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary to build the model with; larger than every token id. Known before the data is read."""
        return self._vocab_size

    @property
    def streaming(self) -> bool:
        """Whether the data is tokenised and packed while it is read."""
        return self._preparation.source.streaming

    @property
    def end_of_document_id(self) -> int:
        """The token that ends a document. Needs prepared data."""
        return self.prepared.tokenizer.end_of_document_id

    @property
    def prepared(self) -> Prepared:
        """The prepared data; prepared now if need be."""
        if self._prepared is None:
            self.setup()
        assert self._prepared is not None
        return self._prepared

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        return self.prepared.tokenizer.encode(text)

    def decode(self, ids: list[int] | torch.Tensor) -> str:
        """The text of some tokens, e.g. of a row of a batch."""
        return self.prepared.tokenizer.decode(ids.tolist() if isinstance(ids, torch.Tensor) else ids)

    def unigram_loss(self) -> float | None:
        """Nats per token, on validation's labels, of a model that knows only token counts; None if streaming."""
        data = self.prepared
        if data.train is None or data.validation is None:
            return None
        return unigram_loss(data.train, data.validation, self.vocab_size, self._collate)

    def prepare_data(self) -> None:
        """Fills the cache; Lightning calls it in one process per node. Several runs may do so at the same time."""
        self._preparation.run(*self._cache_dirs())

    def setup(self, stage: str | None = None) -> None:
        """Opens the cache, and fills it first where :meth:`prepare_data` has not been called."""
        self._share()  # a wrong batch size is told before the data is read
        cache_dir, hub_cache_dir = self._cache_dirs()
        if self._prepared is None:
            self._prepared = self._preparation.open(cache_dir) or self._preparation.run(cache_dir, hub_cache_dir)
            if (smallest := self._prepared.tokenizer.size) > self.vocab_size:
                raise UserValueError(f"vocab_size={self.vocab_size} is too small; legal are {smallest} and more")
        if self._loaded is not None:
            check_tokenizer(self._loaded, self._identity())

    def train_dataloader(self) -> ResumableLoader:
        """Loader of this data rank's training batches."""
        share = self._share()
        if self._loaded is not None:
            check_same(self._loaded, self._identity())
        if self.streaming:
            stream, workers = self._stream("train", share), min(1, self.num_workers)
            loader = ResumableLoader(stream, None, workers, _pin_memory(), collate_fn=self._collate)
        else:
            train = self._enough(self.prepared.train)
            kind = FixedBatchSampler if getattr(self.trainer, "overfit_batches", 0) else GlobalBatchSampler
            sampler = kind(train, share, self.seed, self.prepared.fingerprint)
            loader = ResumableLoader(train, sampler, self.num_workers, _pin_memory(), collate_fn=self._collate)
        loader.cursor = self._cursor = self._cursor_of(loader)
        return loader

    def val_dataloader(self) -> DataLoader:
        """Loader of this data rank's share of all held-out blocks, in their order."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader:
        """Loader of the test split's blocks, or of the held-out ones if there is no ``test_split``."""
        return self._evaluation_loader("test" if self._preparation.source.test_split else "validation")

    def predict_dataloader(self) -> DataLoader:
        """Loader of the held-out blocks; match predictions to blocks by the batch's ``sample``."""
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
        return {
            **self._identity(),
            "vocab_size": self.vocab_size,
            "shuffle_buffer": self.shuffle_buffer,
            "streaming": self.streaming,
            "document_mask": self.document_mask,
        }

    def _identity(self) -> dict[str, Any]:
        return {
            "global_batch_size": self.global_batch_size,
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "tokenizer_fingerprint": self.prepared.tokenizer.fingerprint,
            "dataset_fingerprint": self.prepared.fingerprint,
        }

    def _cursor_of(self, loader: ResumableLoader) -> Cursor:
        """The cursor a new loader follows: the checkpoint's, that of the Trainer's earlier loader, or a new one."""
        state, self._loaded = self._loaded, None
        trainer, previous = self.trainer, self._cursor
        if trainer is not None and state is None and previous is not None and self._cursor_trainer is trainer:
            return previous
        self._cursor_trainer = trainer
        epoch, batch = (state["epoch"], state["samples"] // self.global_batch_size) if state else (0, 0)
        return trainer_cursor(trainer, epoch, batch) if trainer is not None else loader_cursor(loader, epoch, batch)

    @property
    def _collate(self) -> Callable[[Any], Batch]:
        """What a loader makes of a data set's batch."""
        if not self.document_mask:
            return _as_it_is
        return partial(by_document, end_of_document_id=self.end_of_document_id)

    def _evaluation_loader(self, part: str) -> DataLoader:
        share, collate = self._share(), self._collate
        if self.streaming:
            stream, workers = self._stream(part, share), min(1, self.num_workers)
            return DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=collate)
        blocks = getattr(self.prepared, part)
        sampler = FixedBatchSampler(blocks, share, shuffle=False, pad=True)
        options: dict[str, Any] = {"num_workers": self.num_workers, "pin_memory": _pin_memory(), "collate_fn": collate}
        return DataLoader(blocks, sampler=sampler, batch_size=None, **options)

    def _stream(self, part: str, share: Share) -> StreamedBlocks:
        cache_dir, hub_cache_dir = self._cache_dirs()
        documents = getattr(self._preparation.source.load(cache_dir / "sources", hub_cache_dir), part)
        training = part == "train"
        if training and self.shuffle_buffer:
            documents = documents.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
        tokenizer, reading = self.prepared.tokenizer, self._preparation.source.reading
        return StreamedBlocks(documents, tokenizer, self.sequence_length, share, not training, reading)

    def _enough(self, train: Blocks | None) -> Blocks:
        assert train is not None
        if len(train) == 0:
            raise UserValueError(
                f"the training documents of path={self._preparation.source.path!r} are shorter than one block of "
                f"sequence_length + 1 = {self.sequence_length + 1} tokens; give more text, or a smaller "
                "sequence_length"
            )
        if len(train) < self.global_batch_size:
            raise UserValueError(
                f"global_batch_size={self.global_batch_size} is more than the {len(train)} training blocks of "
                f"sequence_length={self.sequence_length}; legal are 1 to {len(train)}, or more text"
            )
        return train

    def _share(self) -> Share:
        options = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return Share(self.global_batch_size, **(options or {}))

    def _cache_dirs(self) -> tuple[Path, Path | None]:
        if self._cache_dir is None:
            return default_cache_dir(), None
        folder = Path(self._cache_dir).expanduser()
        return folder, folder / "downloads"


def _vocab_size(tokenizer: str | None, wanted: int | None, end_of_document: str | None) -> int:
    if tokenizer is None:
        smallest, size = SMALLEST_VOCABULARY, wanted or DEFAULT_VOCABULARY
    elif wanted is not None and is_hub_name(tokenizer):
        return wanted  # checked when the data is prepared
    else:
        smallest = TextTokenizer.load(tokenizer, end_of_document).size
        size = wanted or smallest
    if size < smallest:
        raise UserValueError(f"vocab_size={size} is too small; legal are {smallest} and more")
    return size


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _pin_memory() -> bool:
    return torch.cuda.is_available()
