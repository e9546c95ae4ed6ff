"""What a mixture is of: text, whose blocks are cut from one stream, or conversations, packed in rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lightning_tex.data.chat.encoder import Loss, TooLong
from lightning_tex.data.chat.preparation import ConversationPreparation, require_options
from lightning_tex.data.chat.rows import ConversationSource
from lightning_tex.data.corpus import Source
from lightning_tex.data.mixing import Weight
from lightning_tex.data.packing import Batch, Samples, by_document
from lightning_tex.data.prepared import Preparing
from lightning_tex.data.text import kind_of

Files = str | list[str] | dict[str, str | list[str]]


@dataclass(frozen=True)
class TextSource:
    """Text in a mixture; all but the weight as of :class:`~lightning_tex.data.TextDataModule`.

    Args:
        path, name, data_files, split, validation_split, validation_fraction, text_column: what to read.
        weight: share of the samples, relative to that of the others; or such by micro-step, as ``{0: 1, 1000: 0.2}``,
            interpolated between.
    """

    path: str | None = None
    name: str | None = None
    data_files: Files | None = None
    split: str = "train"
    validation_split: str | None = None
    validation_fraction: float = 0.05
    text_column: str = "text"
    weight: float | dict[int, float] = 1.0

    def source(self) -> Source:
        """What to read, without the weight."""
        return Source(
            self.path, self.name, self.data_files, self.split, self.validation_split, None,
            self.validation_fraction, self.text_column,
        )  # fmt: skip

    def preparing(
        self, tokenizer: str, vocab_size: int, end_of_document: str | None, sequence_length: int
    ) -> Preparing:
        """How it is prepared."""
        source = self.source()
        return kind_of(source, tokenizer)(source, tokenizer, vocab_size, end_of_document, sequence_length)


@dataclass(frozen=True)
class ChatSource:
    """Conversations in a mixture, packed; all but the weight as of :class:`~lightning_tex.data.FineTuningDataModule`.

    Args:
        path, name, data_files, split, validation_split, validation_fraction, columns: what to read.
        loss: "answers" or "all"; by this option a source is one of conversations.
        chat_template, template_options, too_long: as there.
        weight: share of the samples, rows of ``sequence_length``; as of :class:`TextSource`.
    """

    path: str
    loss: Loss
    name: str | None = None
    data_files: Files | None = None
    split: str = "train"
    validation_split: str | None = None
    validation_fraction: float = 0.05
    columns: dict[str, str] | None = None
    chat_template: str | None = None
    template_options: dict[str, Any] | None = None
    too_long: TooLong = "cut"
    weight: float | dict[int, float] = 1.0

    def __post_init__(self) -> None:
        require_options(self.loss, self.too_long, self.columns, self.chat_template)

    def source(self) -> ConversationSource:
        """What to read, without the weight."""
        return ConversationSource(
            self.path, self.name, self.data_files, self.split, self.validation_split, None, self.validation_fraction
        )  # fmt: skip

    def preparing(
        self, tokenizer: str, vocab_size: int, end_of_document: str | None, sequence_length: int
    ) -> Preparing:
        """How it is prepared."""
        return ConversationPreparation(
            self.source(), self.columns, tokenizer, vocab_size, end_of_document, self.chat_template,
            self.template_options, self.loss, self.too_long, sequence_length, packing=True, buckets=(sequence_length,),
        )  # fmt: skip


MixtureSource = TextSource | ChatSource


def weights_of(sources: dict[str, MixtureSource]) -> dict[str, Weight]:
    """The weight of each."""
    return {name: source.weight for name, source in sources.items()}


class DocumentsApart(Samples):
    """Blocks of text whose documents are told apart, with the tensors that rows of conversations have.

    Args:
        blocks: of text.
        end_of_document_id: ends a document.
    """

    def __init__(self, blocks: Samples, end_of_document_id: int) -> None:
        self.blocks, self.end_of_document_id = blocks, end_of_document_id

    def __len__(self) -> int:
        return len(self.blocks)

    def __str__(self) -> str:
        return str(self.blocks)

    def __getitem__(self, samples: list[int]) -> Batch:
        batch = by_document(self.blocks[samples], self.end_of_document_id)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
