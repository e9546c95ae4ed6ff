"""Fine-tuning data in the cache: tokens of conversations, which are learnt, and how they fill rows."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_tex.data.chat.columns import Columns, kind_of
from lightning_tex.data.chat.encoder import ConversationEncoder, Loss, TooLong
from lightning_tex.data.chat.fitting import best_fit
from lightning_tex.data.chat.rows import AnyRows, ConversationSource
from lightning_tex.data.chat.samples import (
    Conversations,
    PackedConversations,
    PaddedConversations,
    mapped_numbers,
    write_numbers,
)
from lightning_tex.data.chat.template import (
    ChatTemplate,
    chat_template,
    end_of_text,
    given_template,
    only_cache,
    tokenizer_config,
)
from lightning_tex.data.corpus import fingerprint
from lightning_tex.data.packing import Samples
from lightning_tex.data.prepared import Notes, Prepared, Preparing, build_once, mark_as_cache
from lightning_tex.data.tokenizer import TextTokenizer, quiet_forks, tokenizer_file, train_bpe
from lightning_tex.data.tokens import Tokens
from lightning_tex.data.tokens.store import open_shards
from lightning_tex.data.tokens.writing import write_tokens
from lightning_tex.parallel.errors import UserValueError, require_choice

_FORMAT = "1"  # raise it when the same settings no longer give the same files
_TURNS = ("<|im_start|>", "<|im_end|>")  # special tokens of a tokenizer that is trained


@dataclass(frozen=True)
class ConversationPreparation(Preparing):
    """All that decides what the prepared conversations are; see :class:`~lightning_tex.data.FineTuningDataModule`."""

    source: ConversationSource
    columns: dict[str, str] | None
    tokenizer: str | None
    vocab_size: int
    end_of_document: str | None
    chat_template: str | None
    template_options: dict[str, Any] | None
    loss: Loss
    too_long: TooLong
    sequence_length: int
    packing: bool
    buckets: tuple[int, ...]

    def __post_init__(self) -> None:
        require_options(self.loss, self.too_long, self.columns, self.chat_template)

    def run(self, cache_dir: Path, hub_cache_dir: Path | None, processes: int | None = None) -> PreparedConversations:
        mark_as_cache(cache_dir)
        parts, documents_key = self.source.parts(cache_dir / "sources", hub_cache_dir)
        columns = self._columns(parts["train"])
        tokenizer_dir = self._tokenizer_dir(parts["train"], columns, documents_key, cache_dir)
        tokenizer, template = self.own_tokenizer(tokenizer_dir), self._template()
        encoder = ConversationEncoder(
            columns, tokenizer, template, self.loss, self.sequence_length + 1, self.too_long
        )  # fmt: skip
        settings = [repr(self.source), str(self.columns), self.loss, self.too_long, str(self.sequence_length)]
        key = fingerprint(
            [_FORMAT, documents_key, tokenizer.fingerprint, template.fingerprint if template else "", *settings]
        )
        folder = write_tokens(cache_dir / "conversations" / key, parts, encoder, processes, self._fill_rows)
        quiet_forks()
        note = {"tokenizer": str(tokenizer_dir), "tokens": str(folder), "parts": list(parts)}
        Notes(cache_dir, asdict(self)).write(note)
        prepared = PreparedConversations(self, note)
        for line in prepared.describe():
            rank_zero_info(line)
        return prepared

    def open(self, cache_dir: Path) -> PreparedConversations | None:
        note = Notes(cache_dir, asdict(self)).read()
        return None if note is None else PreparedConversations(self, note)

    def own_tokenizer(self, place: str | Path) -> TextTokenizer:
        """With the end of document that is given, or that its own configuration names."""
        return TextTokenizer.from_file(place, self.end_of_document or end_of_text(tokenizer_config(self.tokenizer)))

    def _columns(self, rows: AnyRows) -> Columns:
        if len(rows) == 0:
            raise UserValueError(f"path={self.source.path!r} has no rows; legal: at least one")
        place, row = rows.read(0, 1)[0]
        columns = Columns.of(row, self.columns, place)
        example = columns.read(row, place)
        if example.messages is not None and self._template() is None:
            where = " in the Hugging Face hub's cache, and HF_HUB_OFFLINE=1" if only_cache(self.tokenizer) else ""
            raise UserValueError(
                f"{place} is a conversation, and tokenizer={self.tokenizer!r} has no chat template{where}; legal: a "
                "chat_template, a file or 'chatml'"
            )
        return columns

    def _template(self) -> ChatTemplate | None:
        given = self.chat_template or ("chatml" if self.tokenizer is None else None)
        return chat_template(self.tokenizer, given, self.template_options)

    def _tokenizer_dir(self, rows: AnyRows, columns: Columns, documents_key: str, cache_dir: Path) -> Path:
        if self.tokenizer is not None:
            return tokenizer_file(self.tokenizer).resolve()

        def build(folder: Path) -> None:
            texts = _texts(rows, columns)
            train_bpe(texts, self.vocab_size, _TURNS).save(str(folder / "tokenizer.json"))

        key = fingerprint([_FORMAT, "chat", documents_key, str(self.vocab_size), repr(self.source), str(self.columns)])
        return build_once(cache_dir / "tokenizers" / key, build)

    def _fill_rows(self, draft: Path, facts: Mapping[str, list[dict[str, Any]]]) -> None:
        for part, shards in facts.items():
            counts: Counter[str] = Counter()
            for shard in shards:
                counts.update(shard["counts"])
            folder, stream = draft / part, open_shards(draft / part, "")
            ends = stream.ends()
            order, row_ends = best_fit(np.diff(ends, prepend=0) - 1, self.sequence_length)
            for name, numbers in (("ends", ends), ("order", order), ("row_ends", row_ends)):
                write_numbers(folder / f"{name}.numbers", numbers)
            facts_of_part = {"counts": counts, "rows": len(row_ends), "width": self.sequence_length}
            facts_of_part["fingerprint"] = _fingerprint(stream, ends)
            (folder / "summary.json").write_text(json.dumps(facts_of_part))
            if part == "train" and not len(ends):
                raise UserValueError(f"path={self.source.path!r} leaves nothing to train on: {said_of(facts_of_part)}")


def require_options(
    loss: Loss, too_long: TooLong, columns: Mapping[str, str] | None, chat_template: str | None
) -> None:
    """Refuse options of conversations that no data could have.

    Raises:
        ValueError: naming what is legal.
        FileNotFoundError: no such template.
    """
    require_choice("loss", loss, get_args(Loss))
    require_choice("too_long", too_long, get_args(TooLong))
    if columns:
        kind_of(columns)
    if chat_template is not None:
        given_template(chat_template)


class PreparedConversations(Prepared):
    """Conversations in the cache, as samples.

    The fingerprint is that of the tokens, of which are learnt, and of how they lie in rows.
    """

    def __init__(self, preparation: ConversationPreparation, note: dict[str, Any]) -> None:
        self.tokenizer = preparation.own_tokenizer(note["tokenizer"])
        self.folder = Path(note["tokens"])
        parts = {part: self._samples(preparation, part) for part in note["parts"]}
        self.train, self.validation, self.test = parts["train"], parts["validation"], parts.get("test")
        rows = f"rows of {preparation.sequence_length}" if preparation.packing else repr(preparation.buckets)
        self.fingerprint = fingerprint([str(summary(self.folder / "train")["fingerprint"]), rows])

    def describe(self) -> list[str]:
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return [f"{n}: {said_of(summary(self.folder / n))}" for n, samples in parts.items() if samples is not None]

    def _samples(self, preparation: ConversationPreparation, part: str) -> Samples:
        folder = self.folder / part
        stream = open_shards(folder, f"delete the folder {self.folder}, and the data is prepared again")
        ends, order, row_ends = (mapped_numbers(folder / f"{n}.numbers") for n in ("ends", "order", "row_ends"))
        conversations = Conversations(stream, ends, self.tokenizer.size)
        fill = self.tokenizer.end_of_document_id
        if preparation.packing:
            return PackedConversations(conversations, order, row_ends, preparation.sequence_length, fill)
        return PaddedConversations(conversations, preparation.buckets, fill)


def summary(folder: Path) -> dict[str, Any]:
    """What is known of one part."""
    facts: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return facts


def said_of(facts: Mapping[str, Any]) -> str:
    """A summary in words."""
    counts = Counter(facts["counts"])
    inputs, room = counts["tokens"] - counts["conversations"], facts["rows"] * facts["width"]
    left_out = [f"{number:,} {reason}" for reason, number in sorted(counts.items()) if ", " in reason and number]
    return (
        f"{counts['conversations']:,} of {counts['rows']:,} conversations"
        + (f" ({'; '.join(left_out)})" if left_out else "")
        + f", {counts['tokens']:,} tokens, {_percent(counts['learnt'], inputs)} of them learnt; packed they fill "
        f"{facts['rows']:,} rows of {facts['width']:,}, {_percent(room - inputs, room)} of which is padding"
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.1f} %"


def _texts(rows: AnyRows, columns: Columns) -> Iterator[str]:
    for number in range(len(rows)):
        for place, row in rows.read(number, number + 1):
            example = columns.read(row, place)
            yield example.prompt + example.completion
            for message in example.messages or []:
                yield from (text for text in [message.get("content")] if isinstance(text, str))


def _fingerprint(stream: Tokens, ends: np.ndarray) -> str:
    digest = hashlib.blake2b(ends.astype("<i8").tobytes(), digest_size=16)
    at_once = 1 << 22
    for start in range(0, len(stream), at_once):
        stop = min(start + at_once, len(stream))
        digest.update(stream.read(start, stop).astype("<u4").data)
        digest.update(stream.trained(start, stop).tobytes())
    return digest.hexdigest()
