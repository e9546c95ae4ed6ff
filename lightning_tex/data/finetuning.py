"""``FineTuningDataModule``: conversations -> tokens, of which answers are learnt -> rows -> batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_tex.data.chat.encoder import Loss, TooLong
from lightning_tex.data.chat.preparation import ConversationPreparation
from lightning_tex.data.chat.rows import ConversationSource
from lightning_tex.data.chat.samples import PaddedConversations
from lightning_tex.data.loader import ResumableLoader
from lightning_tex.data.order import LengthGroupedSampler, Share
from lightning_tex.data.text import known_vocab_size
from lightning_tex.data.token_data import TokenDataModule
from lightning_tex.parallel.errors import UserValueError, require_choice


class FineTuningDataModule(TokenDataModule):
    """Conversations for language models, of which the answers are learnt; order and resumption are those of text.

    A row of the data has ``messages`` (a list of objects with ``role`` and ``content``), ``prompt`` and ``completion``
    (both texts, or both messages), or ``text``, of which all is learnt. Messages become a text by the tokenizer's own
    chat template, rendered in Jinja's sandbox; an answer is all that the assistant gives, with the token that ends its
    turn. A ``completion`` and a ``text`` end with the end of document.

    A batch has ``input_ids``, ``labels`` (-100 where nothing is learnt) and ``attention_mask``, all [b, S], and
    ``sample`` [b]. With ``packing``, whole conversations lie one behind the other in rows of S = sequence_length,
    and ``segments`` [b, S] tells them apart: they do not see each other, and train as each by itself. Without, each has
    a row of its own, and S is the least of ``buckets`` that holds the rank's longest one; neighbours in the order of an
    epoch are of about one length.

    Args:
        path: a folder or file of .jsonl, .json, .csv or .parquet, or what else ``datasets.load_dataset`` reads.
        name: configuration of the data set.
        data_files: files of a builder, also by split.
        split: what to train on.
        validation_split: what to validate on. None: the split "validation", or held-out rows if there is none.
        test_split: what to test on. None: the validation rows.
        validation_fraction: share of the rows held out, every n-th one.
        columns: what the data calls its columns, such as ``{"messages": "chat"}``. None: told by the first row.
        tokenizer: a ``tokenizers`` JSON file, a folder with ``tokenizer.json``, or a repository of the Hugging Face
            hub. None: train a byte-level BPE on the conversations, with the template "chatml".
        vocab_size: as of :class:`TextDataModule`.
        end_of_document: the token that ends a document. None: the tokenizer's ``eos_token``, or the first it has of
            the usual ones.
        chat_template: a Jinja file, or "chatml". None: the tokenizer's own, of ``chat_template.jinja`` or
            ``tokenizer_config.json``.
        template_options: further variables of the template, such as ``{"enable_thinking": false}``.
        loss: "answers" or "all".
        packing: several conversations in a row, by best fit.
        buckets: lengths of rows without packing. None: sequence_length and its halves down to 64.
        too_long: what becomes of a conversation of more than sequence_length + 1 tokens: "cut" or "leave_out".
        sequence_length: S, tokens of a row at most.
        global_batch_size: rows of one micro-step over the whole data axis.
        seed: of the sample order.
        num_workers: processes that read ahead.
        num_proc: processes that prepare the data, once; None: as many as there are processors.
        cache_dir: of prepared data; as of :class:`TextDataModule`.

    Raises:
        ValueError: options that contradict each other or the data, naming what is legal; data that is not what it
            should be, naming file and row.
        FileNotFoundError: no such tokenizer, template or data.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        data_files: str | list[str] | dict[str, str | list[str]] | None = None,
        split: str = "train",
        validation_split: str | None = None,
        test_split: str | None = None,
        validation_fraction: float = 0.05,
        columns: dict[str, str] | None = None,
        tokenizer: str | None = None,
        vocab_size: int | None = None,
        end_of_document: str | None = None,
        chat_template: str | None = None,
        template_options: dict[str, Any] | None = None,
        loss: Loss = "answers",
        packing: bool = True,
        buckets: list[int] | None = None,
        too_long: TooLong = "cut",
        sequence_length: int = 1024,
        global_batch_size: int = 8,
        seed: int = 0,
        num_workers: int = 0,
        num_proc: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        require_choice("packing", packing, (True, False))
        if buckets is not None and packing:
            raise UserValueError(f"buckets={buckets} need packing=False; packed rows all have sequence_length")
        source = ConversationSource(
            str(path), name, data_files, split, validation_split, test_split, validation_fraction
        )  # fmt: skip
        size = known_vocab_size(tokenizer, vocab_size, end_of_document)
        preparation = ConversationPreparation(
            source, columns, tokenizer, size, end_of_document, chat_template, template_options, loss, too_long,
            sequence_length, packing, legal_buckets(buckets, sequence_length),
        )  # fmt: skip
        super().__init__(
            preparation, size, sequence_length, global_batch_size, seed, num_workers, num_proc, cache_dir
        )  # fmt: skip
        self.document_mask = packing

    def alike_on_all_ranks(self) -> dict[str, Any]:
        return {**super().alike_on_all_ranks(), "packing": self._preparation.packing}

    def _train_loader(self, share: Share) -> ResumableLoader:
        train = self.prepared.train
        fixed = self.trainer is not None and self.trainer.overfit_batches  # type: ignore[attr-defined]
        if not isinstance(train, PaddedConversations) or fixed:
            return super()._train_loader(share)
        self._enough(train)
        sampler = LengthGroupedSampler(train, share, train.bucket_of, self.seed, self.prepared.fingerprint)
        return self._resumable(train, sampler)


def legal_buckets(buckets: Sequence[int] | None, sequence_length: int) -> tuple[int, ...]:
    """Lengths of rows in rising order, the last of which is ``sequence_length``.

    Raises:
        ValueError: they are not.
    """
    if buckets is None:
        lengths = [sequence_length]
        while lengths[0] % 2 == 0 and lengths[0] >= 128:
            lengths.insert(0, lengths[0] // 2)
        return tuple(lengths)
    if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1 or buckets[-1] != sequence_length:
        raise UserValueError(
            f"buckets={list(buckets)}; legal: rising lengths from 1, the last of which is sequence_length="
            f"{sequence_length}"
        )
    return tuple(buckets)
