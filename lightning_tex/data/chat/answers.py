"""Where in a rendered conversation the assistant's answers are: characters that the model has to give itself.

A template that marks them (``{% generation %}``) is asked. With any other, an answer begins where the prompt that the
model would be given ends, which is the template's own rendering of the messages before with ``add_generation_prompt``;
and it ends with the special token that ends the turn, behind the message's content, which is found by rendering once
more with marks in it. Every way is checked against the conversation's plain rendering: where the template treats
messages differently by what follows them (a prompt that is no beginning of the whole, a mark that changes the text or
stands nowhere), the next way is tried, and if none is left the conversation is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, islice
from typing import Any

from lightning_tex.data.chat.template import ChatTemplate, Message, TemplateRaised

Span = tuple[int, int]  # characters, [start, end)
_PRIVATE_USE = 0xE000  # characters that no text has a meaning for


class UnknownAnswer(ValueError):
    """A template from whose rendering it cannot be told where an answer is."""


@dataclass(frozen=True)
class Rendered:
    """A conversation's text, and its answers in their order."""

    text: str
    answers: list[Span]


class AnswerFinder:
    """Renders conversations and finds the answers in them.

    Args:
        template: renders.
        special_tokens: of the tokenizer, of which one ends a turn.
    """

    def __init__(self, template: ChatTemplate, special_tokens: Sequence[str]) -> None:
        self.template = template
        longest_first = sorted(filter(None, special_tokens), key=len, reverse=True)
        self._end_of_turn = re.compile(r"\s*(?:" + "|".join(map(re.escape, longest_first)) + ")")
        self._has_ends = bool(longest_first)

    def find(self, messages: Sequence[Message], answers: Sequence[int], variables: Mapping[str, Any]) -> Rendered:
        """The text of a conversation, and where its answers are.

        Args:
            messages: of it.
            answers: which of them are.
            variables: of the template, such as ``tools``.

        Raises:
            TemplateRaised: the template does not take these messages.
            UnknownAnswer: where an answer is cannot be told.
        """
        text = self.template.render(messages, **variables)
        if self.template.marks_answers:
            return Rendered(text, self._marked_by_template(text, messages, variables))
        ends = self._marked(text, messages, answers, _marked_at_end, variables)
        return Rendered(text, [self._span(text, messages, index, ends.get(index), variables) for index in answers])

    def _marked_by_template(self, text: str, messages: Sequence[Message], variables: Mapping[str, Any]) -> list[Span]:
        start, end = _unused(text, 2)
        pieces = re.split(f"([{start}{end}])", self.template.render(messages, marks=(start, end), **variables))
        if "".join(pieces[::2]) != text or pieces[1::2] != [start, end] * (len(pieces) // 4):
            raise UnknownAnswer("its {% generation %} blocks lie in one another, or what they give is changed")
        places = list(accumulate(map(len, pieces[::2])))
        return list(zip(places[:-1:2], places[1::2], strict=True))

    def _marked(
        self,
        text: str,
        messages: Sequence[Message],
        answers: Sequence[int],
        with_mark: Callable[[Any, str], Any],
        variables: Mapping[str, Any],
    ) -> dict[int, int]:
        """By message, where a mark in its content stands in the text; of those that stand there once, if any."""
        if not answers:
            return {}
        marks = dict(zip(answers, _unused(text, len(answers)), strict=True))
        changed = list(messages)
        for index, mark in marks.items():
            changed[index] = {**messages[index], "content": with_mark(messages[index].get("content"), mark)}
        try:
            marked = self.template.render(changed, **variables)
        except TemplateRaised:
            return {}
        pieces = re.split(f"([{''.join(marks.values())}])", marked)
        if "".join(pieces[::2]) != text:
            return {}
        found = dict(zip(pieces[1::2], accumulate(map(len, pieces[::2])), strict=False))
        return {index: found[mark] for index, mark in marks.items() if marked.count(mark) == 1}

    def _span(
        self, text: str, messages: Sequence[Message], index: int, content_end: int | None, variables: Mapping[str, Any]
    ) -> Span:
        prompt = self._beginning(text, messages[:index], True, variables)
        start = prompt
        if start is None:
            start = self._marked(text, messages, [index], _marked_at_start, variables).get(index)
        if start is None:
            raise UnknownAnswer(
                f"message {index}: the prompt before it is no beginning of the whole conversation, and its content "
                "does not stand there as it is"
            )
        if content_end is not None and content_end >= start and self._has_ends:
            token = self._end_of_turn.match(text, content_end)
            if token is not None:
                return start, token.end()
        end = None if prompt is None else self._beginning(text, messages[: index + 1], False, variables)
        if end is not None and end > start:
            return start, self._without_rest(text, start, end)
        raise UnknownAnswer(
            f"message {index}: no special token of the tokenizer ends it, and the conversation up to it is no "
            "beginning of the whole"
        )

    def _beginning(
        self, text: str, messages: Sequence[Message], prompt: bool, variables: Mapping[str, Any]
    ) -> int | None:
        """The length of the rendering of some messages, where it is the text's beginning."""
        try:
            beginning = self.template.render(messages, add_generation_prompt=prompt, **variables)
        except TemplateRaised:
            return None
        return len(beginning) if text.startswith(beginning) else None

    def _without_rest(self, text: str, start: int, end: int) -> int:
        """The end without white space behind the special token that ends the turn."""
        stripped = len(text[:end].rstrip())
        if not self._has_ends or stripped <= start:
            return end
        ends = [found.end() for found in self._end_of_turn.finditer(text, start, end)]
        return stripped if ends and ends[-1] == stripped else end


def _unused(text: str, wanted: int) -> list[str]:
    """Different characters that a text does not have."""
    there = set(text)
    return list(islice((chr(code) for code in count(_PRIVATE_USE) if chr(code) not in there), wanted))


def _marked_at_start(content: Any, mark: str) -> Any:
    """A content with a mark behind the white space that it begins with, which templates cut off."""
    return _changed(content, 0, lambda text: text[: len(text) - len(text.lstrip())] + mark + text.lstrip())


def _marked_at_end(content: Any, mark: str) -> Any:
    """A content with a mark before the white space that it ends with."""
    return _changed(content, -1, lambda text: text.rstrip() + mark + text[len(text.rstrip()) :])


def _changed(content: Any, which: int, change: Callable[[str], str]) -> Any:
    """A text, or the first or last text of a list of parts, changed; what has none stays."""
    if isinstance(content, str):
        return change(content) if content.strip() else content
    if not isinstance(content, list):
        return content
    parts = [dict(part) if isinstance(part, Mapping) else part for part in content]
    texts = [part for part in parts if isinstance(part, dict) and str(part.get("text") or "").strip()]
    if texts:
        texts[which]["text"] = change(str(texts[which]["text"]))
    return parts
