"""Rows of fine-tuning data, told apart by their columns: messages, prompt and completion, or text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_tex.parallel.errors import UserValueError

KINDS = (("messages",), ("prompt", "completion"), ("text",))  # in this order, where a row has several
_LEGAL = "messages; prompt and completion; text (or name them: columns={'messages': 'the_name_here'})"
_OTHER_ROLES = {"human": "user", "gpt": "assistant"}  # with "from" and "value" for "role" and "content"
ASSISTANT = "assistant"


@dataclass(frozen=True)
class Example:
    """One row.

    Args:
        messages: of a conversation; None: it is plain text.
        answers: which of the messages are answers.
        prompt, completion: plain text; the prompt is empty where all is to be learnt.
        variables: of a chat template.
    """

    messages: list[dict[str, Any]] | None = None
    answers: list[int] = field(default_factory=list)
    prompt: str = ""
    completion: str = ""
    variables: dict[str, Any] = field(default_factory=dict)


class Columns:
    """Reads rows whose columns were told by one of them.

    Args:
        kind: one of ``KINDS``.
        names: what the data calls them, where it has other names.
    """

    def __init__(self, kind: Sequence[str], names: Mapping[str, str]) -> None:
        self.kind, self.names = tuple(kind), {column: names.get(column, column) for column in kind}

    @classmethod
    def of(cls, row: Mapping[str, Any], names: Mapping[str, str] | None, place: str) -> Columns:
        """Those of a row.

        Args:
            row: of the data.
            names: what the data calls its columns; what is named must be there.
            place: of the row, for messages.

        Raises:
            ValueError: it has none of the known ones.
        """
        if names:
            return cls(kind_of(names), names)
        for kind in KINDS:
            if all(row.get(column) is not None for column in kind):
                return cls(kind, {})
        raise UserValueError(f"{place} has the columns {_listed(row)}; legal: {_LEGAL}")

    def __str__(self) -> str:
        return " and ".join(self.names.values())

    def read(self, row: Mapping[str, Any], place: str) -> Example:
        """What a row holds.

        Raises:
            ValueError: a column is missing or not what it should be, naming the place.
        """
        values = {}
        for column, name in self.names.items():
            values[column] = row.get(name)
            if values[column] is None:
                has = _listed({key: value for key, value in row.items() if value is not None})
                raise UserValueError(
                    f"{place} has no {name!r}, and the first row has; it has: {has}. Legal: the same columns in all "
                    "rows (leave such rows out, or train on them by themselves)"
                )
        if self.kind == ("messages",):
            messages = _messages(values["messages"], self.names["messages"], place)
            return Example(messages, _assistants(messages), variables=_variables(row))
        if self.kind == ("text",):
            return Example(completion=_text(values["text"], self.names["text"], place))
        prompt, completion = values["prompt"], values["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return Example(prompt=prompt, completion=completion)
        if isinstance(prompt, str) or isinstance(completion, str):
            kinds = ", ".join(f"{name} is {type(row[name]).__name__}" for name in self.names.values())
            raise UserValueError(f"{place}: {kinds}; legal: two texts, or two lists of messages")
        before = _messages(prompt, self.names["prompt"], place)
        after = _messages(completion, self.names["completion"], place)
        answers = [len(before) + index for index in _assistants(after)]
        return Example([*before, *after], answers, variables=_variables(row))


def kind_of(names: Mapping[str, str]) -> Sequence[str]:
    """Which of ``KINDS`` some names are for.

    Raises:
        ValueError: none.
    """
    for kind in KINDS:
        if set(names) == set(kind):
            return kind
    raise UserValueError(f"columns={dict(names)!r}; legal: names for {'; for '.join(map(' and '.join, KINDS))}")


def _listed(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "none"


def _variables(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"tools": row["tools"]} if row.get("tools") else {}


def _assistants(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]


def _text(value: Any, name: str, place: str) -> str:
    if not isinstance(value, str):
        raise UserValueError(f"{place}: {name} is {type(value).__name__}; legal: a text")
    return value


def _messages(value: Any, name: str, place: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise UserValueError(f"{place}: {name} is {type(value).__name__}; legal: a list of messages with role, content")
    return [_message(message, f"{place}: {name}[{index}]") for index, message in enumerate(value)]


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UserValueError(f"{place} is {type(message).__name__}; legal: an object with role and content")
    if "role" not in message and "from" in message:
        role = message["from"]
        message = {"role": _OTHER_ROLES.get(role, role), "content": message.get("value")}
    if not isinstance(message.get("role"), str):
        raise UserValueError(f"{place} has no role, but {_listed(message)}; legal: role and content")
    if not isinstance(message.get("content"), (str, list)) and not message.get("tool_calls"):
        raise UserValueError(f"{place}: content is {type(message.get('content')).__name__}; legal: a text")
    return dict(message)
