"""Rows of fine-tuning data to tokens, and which of them are learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from lightning_tex.data.chat.answers import AnswerFinder, Rendered, UnknownAnswer
from lightning_tex.data.chat.columns import Columns, Example
from lightning_tex.data.chat.rows import Placed
from lightning_tex.data.chat.template import ChatTemplate, TemplateRaised
from lightning_tex.data.tokenizer import TextTokenizer
from lightning_tex.data.tokens.store import token_dtype
from lightning_tex.data.tokens.writing import Encoded
from lightning_tex.parallel.errors import UserValueError

SPELLED_OUT = "with a special token spelled out, kept"
Loss = Literal["answers", "all"]
TooLong = Literal["cut", "leave_out"]


@dataclass(frozen=True)
class _Text(Rendered):
    """A row's text, its answers, and whether the end of document follows, which is learnt, too."""

    ends: bool = False


class ConversationEncoder:
    """Makes documents of rows.

    Args:
        columns: of the rows.
        tokenizer: of the texts.
        template: of conversations; None: there are none.
        loss: what is learnt.
        longest: tokens of a document at most.
        too_long: what becomes of one that is longer.
    """

    def __init__(
        self,
        columns: Columns,
        tokenizer: TextTokenizer,
        template: ChatTemplate | None,
        loss: Loss,
        longest: int,
        too_long: TooLong,
    ) -> None:
        self.columns, self.tokenizer, self.template = columns, tokenizer, template
        self.loss, self.longest, self.too_long = loss, longest, too_long
        self.dtype = token_dtype(tokenizer.size)

    def encode(self, rows: Sequence[Placed], first: int) -> Encoded:
        """Documents of some rows; counted are those that are cut or left out, and why.

        Raises:
            ValueError: naming the row that is not what it should be.
        """
        examples = [self.columns.read(row, place) for place, row in rows]
        texts = [self._text(example, place) for example, (place, _) in zip(examples, rows, strict=True)]
        encoded = Encoded([], [])
        encoded.counts[SPELLED_OUT] = sum(map(self._spells_out, examples))
        for ids, offsets, text in zip(*self._tokens(texts), texts, strict=True):
            tokens, trained = self._document(ids, offsets, text)
            self._keep(encoded, tokens, trained)
        return encoded

    def _keep(self, encoded: Encoded, tokens: np.ndarray, trained: np.ndarray) -> None:
        counts = encoded.counts
        counts["rows"] += 1
        if len(tokens) > self.longest:
            counts[f"too long, {'cut' if self.too_long == 'cut' else 'left out'}"] += 1
            if self.too_long == "leave_out":
                return
            tokens, trained = tokens[: self.longest], trained[: self.longest]
        if not trained[1:].any():
            counts["nothing to learn, left out"] += 1
            return
        assert encoded.trained is not None
        encoded.documents.append(tokens)
        encoded.trained.append(trained)
        counts["conversations"] += 1
        counts["tokens"] += len(tokens)
        counts["learnt"] += int(trained[1:].sum())

    def _spells_out(self, example: Example) -> bool:
        """Whether what somebody said has a special token, which ends a turn as the template's own does."""
        said = [str(message.get("content")) for message in example.messages or []]
        return any(token in text for text in [*said, example.prompt, example.completion] for token in self._special)

    def _text(self, example: Example, place: str) -> _Text:
        if example.messages is None:
            text = example.prompt + example.completion
            return _Text(text, [(len(example.prompt), len(text))], ends=True)
        try:
            if self.loss == "answers":
                found = self._finder.find(example.messages, example.answers, example.variables)
                return _Text(found.text, found.answers)
            assert self.template is not None
            return _Text(self.template.render(example.messages, **example.variables), [])
        except TemplateRaised as error:
            raise UserValueError(f"{place}: the chat template does not take it: {error}") from error
        except UnknownAnswer as error:
            raise UserValueError(
                f"{place}: it cannot be told which of the tokens are the answer, {error}; legal: a chat_template that "
                "marks it by {% generation %}, or loss='all'"
            ) from error

    def _document(self, ids: list[int], offsets: list[tuple[int, int]], text: _Text) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.array([*ids, self.tokenizer.end_of_document_id] if text.ends else ids, self.dtype)
        trained = np.ones(len(tokens), np.uint8)
        if self.loss == "answers":
            trained[: len(ids)] = within(np.array(offsets, np.int64).reshape(-1, 2), text.answers)
        return tokens, trained

    def _tokens(self, texts: Sequence[Rendered]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        with self.tokenizer.encoding():
            encodings = self._tokenizer.encode_batch([text.text for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings], [encoding.offsets for encoding in encodings]

    @cached_property
    def _tokenizer(self) -> Any:
        """One to which special tokens are special in a text, as templates write them."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.tokenizer.tokenizer.to_str())
        tokenizer.encode_special_tokens = False
        return tokenizer

    @cached_property
    def _finder(self) -> AnswerFinder:
        assert self.template is not None
        return AnswerFinder(self.template, self._special)

    @cached_property
    def _special(self) -> list[str]:
        added = self.tokenizer.tokenizer.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]


def within(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens have characters of some spans: bytes, 1 for one that has.

    Args:
        offsets: [T, 2], of the characters of each token; equal ones where it has none of its own.
        spans: [start, end) each.
    """
    starts, ends = offsets[:, 0], offsets[:, 1]
    found = np.zeros(len(offsets), np.uint8)
    for start, end in spans:
        found |= (starts < end) & (np.maximum(ends, starts + 1) > start)
    return found
