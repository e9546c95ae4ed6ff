"""``TextDataModule``: documents -> tokens -> blocks -> batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch.utils.data import DataLoader

from lightning_tex.data.corpus import Source
from lightning_tex.data.loader import ResumableLoader
from lightning_tex.data.order import Share
from lightning_tex.data.packing import Batch, Blocks, StreamedBlocks, by_document, unigram_loss
from lightning_tex.data.prepared import Packing, Preparation, TokenizedPreparation
from lightning_tex.data.resume import Cursor, steps_done
from lightning_tex.data.streams.loader import StreamLoader, endless_cursor
from lightning_tex.data.streams.order import require_parts
from lightning_tex.data.streams.stream import StreamInParts
from lightning_tex.data.token_data import TokenDataModule
from lightning_tex.data.tokenizer import SMALLEST_VOCABULARY, TextTokenizer, is_hub_name
from lightning_tex.data.tokens.foreign import foreign_files
from lightning_tex.parallel.errors import UserValueError, require_choice

DEFAULT_VOCABULARY = 4096


class TextDataModule(TokenDataModule):
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
    another size, reads exactly what it would have read. With ``streaming=True`` ``len`` is unknown, so limit training
    by ``max_steps`` and validation by ``limit_val_batches``. With ``stream_parts=P`` as well, data ranks read different
    shards, which are tokenised once in all, resuming opens the shards that were being read, and a part begins its
    next epoch when it has been read: the stream does not end. Without, every rank reads and tokenises all of a stream,
    a resumed run does so from its start, and that the data is unchanged is not checked.

    Args:
        path: what to read, as in ``datasets.load_dataset``: a data set's name, a builder ("text", "json", ...) with
            ``data_files``; a folder or file of text (.txt, .md, .rst: a document each), .jsonl, .csv, .parquet or
            .arrow; what ``datasets`` has saved; or tokens that others have prepared, Megatron's .bin with .idx or
            datatrove's .ds, which are read as they lie. None: the sources of the running Python's standard library, so
            that there is real text on every machine.
        name: configuration of the data set.
        data_files: files of a builder, also by split.
        split: what to train on; slices such as "train[:10%]" are legal unless streaming.
        validation_split: what to validate on. None: the split "validation", or held-out documents if there is none.
        test_split: what to test on. None: the validation blocks.
        validation_fraction: share of the documents held out, every n-th one.
        streaming: do not download; tokenise and pack while reading.
        shuffle_buffer: documents in the shuffle buffer of a stream, in parts of each; 0: in the stream's order.
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
        num_proc: processes that prepare the data, once; None: as many as there are processors.
        stream_parts: P, a divisor of global_batch_size: read a stream in so many parts, best a multiple of data ranks
            times workers. None: as a whole.
        packing: "cut": one stream of tokens, in blocks. "fit": whole documents in rows, by best fit, which do not see
            each other; those that are too long are divided. A batch then has ``attention_mask [b, S]`` besides.

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
        num_proc: int | None = None,
        stream_parts: int | None = None,
        packing: Packing = "cut",
    ) -> None:
        require_choice("packing", packing, get_args(Packing))
        require_choice("streaming", streaming, (True, False))
        require_choice("document_mask", document_mask, (True, False))
        if shuffle_buffer < 0:
            raise UserValueError(f"shuffle_buffer={shuffle_buffer}; legal: 0, or a number of documents")
        for option, given in (("shuffle_buffer", shuffle_buffer), ("stream_parts", stream_parts)):
            if given and not streaming:
                raise UserValueError(f"{option}={given} needs streaming=True; other data is shuffled as a whole")
        if packing == "fit" and streaming:
            raise UserValueError("packing='fit' with streaming=True; legal: packing='cut', or streaming=False")
        if stream_parts is not None:
            require_parts(stream_parts, global_batch_size)
        source = Source(
            str(path) if path is not None else None, name, data_files, split, validation_split, test_split,
            validation_fraction, text_column, streaming, max_bytes,
        )  # fmt: skip
        size = known_vocab_size(tokenizer, vocab_size, end_of_document)
        preparation = kind_of(source, tokenizer)(
            source, None if tokenizer is None else str(tokenizer), size, end_of_document, sequence_length, packing
        )
        super().__init__(
            preparation, size, sequence_length, global_batch_size, seed, num_workers, num_proc, cache_dir
        )  # fmt: skip
        self.shuffle_buffer = shuffle_buffer
        self.document_mask = document_mask or packing == "fit"
        self.stream_parts = stream_parts
        self._stream_in_parts: StreamInParts | None = None

    @property
    def streaming(self) -> bool:
        """Whether the data is tokenised and packed while it is read."""
        return self._preparation.source.streaming

    def unigram_loss(self) -> float | None:
        """Nats per token, on validation's labels, of a model that knows only token counts; None but of blocks."""
        data = self.prepared
        if not isinstance(data.train, Blocks) or not isinstance(data.validation, Blocks):
            return None
        return unigram_loss(data.train, data.validation, self.vocab_size, self._collate)

    def alike_on_all_ranks(self) -> dict[str, Any]:
        """What every rank of a run must have alike, for the strategy's comparison; a module of your own may say it."""
        return {
            **super().alike_on_all_ranks(),
            "shuffle_buffer": self.shuffle_buffer,
            "streaming": self.streaming,
            "document_mask": self.document_mask,
            "packing": self._preparation.packing,
            "stream": None if self.stream_parts is None else self._in_parts().facts(),
        }

    def train_dataloader(self) -> ResumableLoader:
        """Loader of this data rank's training batches."""
        state = self._loaded or {}
        if state.get("samples") and ("stream" in state) != (self.stream_parts is not None):
            before = state["stream"]["stream_parts"] if "stream" in state else None
            raise UserValueError(
                f"stream_parts={self.stream_parts} but the checkpoint was trained with stream_parts={before}; only the "
                "latter continues with the next sample"
            )
        return super().train_dataloader()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self._loaded is None and self._cursor is not None and self._stream_in_parts is not None:
            step = state["samples"] // self.global_batch_size
            state["stream"] = self._stream_in_parts.state(step, self.trainer)
        return state

    @property
    def _collate(self) -> Callable[[Any], Batch]:
        """What a loader makes of a data set's batch."""
        if not self.document_mask or self._preparation.packing == "fit":
            return super()._collate
        return partial(by_document, end_of_document_id=self.end_of_document_id)

    def test_dataloader(self) -> DataLoader:
        """Loader of the test split's blocks, or of the held-out ones if there is no ``test_split``."""
        return self._evaluation_loader("test" if self._preparation.source.test_split else "validation")

    def _train_loader(self, share: Share) -> ResumableLoader:
        if not self.streaming:
            return super()._train_loader(share)
        if self.stream_parts is not None:
            return self._loader_of_parts(share)
        workers = min(1, self.num_workers)
        return ResumableLoader(
            self._stream("train", share), None, workers, torch.cuda.is_available(), collate_fn=self._collate
        )

    def _evaluation_loader(self, part: str) -> DataLoader:
        if not self.streaming:
            return super()._evaluation_loader(part)
        share, workers = self._share(), min(1, self.num_workers)
        tokenizer, length = self.prepared.tokenizer, self.sequence_length
        in_parts = self.stream_parts is not None
        stream = self._in_parts().evaluation(part, tokenizer, length, share) if in_parts else self._stream(part, share)
        return DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=self._collate)

    def _loader_of_parts(self, share: Share) -> ResumableLoader:
        if self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            raise UserValueError(f"overfit_batches with stream_parts={self.stream_parts}; legal: stream_parts=None")
        stream = self._in_parts()
        if self._loaded is not None and "stream" in self._loaded:
            stream.load(self._loaded["stream"])
        return stream.loader(
            self.prepared.tokenizer, self.sequence_length, share, self._collate, self.num_workers,
            torch.cuda.is_available(),
        )  # fmt: skip

    def _new_cursor(self, loader: ResumableLoader, epoch: int, batch: int) -> Cursor:
        if not isinstance(loader, StreamLoader):
            return super()._new_cursor(loader, epoch, batch)
        loader.positions = self._in_parts().begin(batch)
        done = (lambda: loader.batches_fetched) if self.trainer is None else partial(steps_done, self.trainer)
        return endless_cursor(done, batch)

    def _in_parts(self) -> StreamInParts:
        if self._stream_in_parts is None:
            cache_dir, hub_cache_dir = self._cache_dirs()
            self._stream_in_parts = StreamInParts(
                self._preparation.source, int(self.stream_parts or 1), self.seed, self.shuffle_buffer,
                cache_dir / "sources", hub_cache_dir,
            )  # fmt: skip
        return self._stream_in_parts

    def _stream(self, part: str, share: Share) -> StreamedBlocks:
        training, (cache_dir, hub_cache_dir) = part == "train", self._cache_dirs()
        documents = getattr(self._preparation.source.load(cache_dir / "sources", hub_cache_dir), part)
        if training and self.shuffle_buffer:
            documents = documents.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
        tokenizer, reading = self.prepared.tokenizer, self._preparation.source.reading
        return StreamedBlocks(documents, tokenizer, self.sequence_length, share, not training, reading)

    def _too_few(self, samples: int) -> str:
        if samples == 0:
            return (
                f"the training documents of path={self._preparation.source.path!r} are shorter than one block of "
                f"sequence_length + 1 = {self.sequence_length + 1} tokens; give more text, or a smaller "
                "sequence_length"
            )
        return (
            f"global_batch_size={self.global_batch_size} is more than the {samples} training blocks of "
            f"sequence_length={self.sequence_length}; legal are 1 to {samples}, or more text"
        )


def kind_of(source: Source, tokenizer: str | None) -> type[Preparation]:
    """How what a source names is prepared.

    Raises:
        ValueError: options that tokens of others do not have.
    """
    if source.path is None or source.data_files or not foreign_files(Path(source.path).expanduser()):
        return Preparation
    given = [name for name in ("name", "streaming", "validation_split", "test_split") if getattr(source, name)]
    if given or tokenizer is None:
        wrong = f"{given[0]}={getattr(source, given[0])!r}" if given else "tokenizer=None"
        raise UserValueError(
            f"{wrong}, and path={source.path!r} holds tokens that others have made; legal: the tokenizer that they "
            "were made with, validation_fraction, and none of name, streaming, validation_split and test_split"
        )
    return TokenizedPreparation


def known_vocab_size(tokenizer: str | None, wanted: int | None, end_of_document: str | None) -> int:
    """The vocabulary's size before the data is read: what is wanted, or what the tokenizer has.

    Raises:
        ValueError: less is wanted than the tokenizer has.
    """
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
