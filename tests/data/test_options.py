"""Options of data modules that cannot be meant: refused where they are given, by name, with what is legal."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from lightning_tex.data import ChatSource, FineTuningDataModule, MixtureDataModule, TextDataModule, TextSource
from lightning_tex.errors import UserError

text, chats = TextDataModule, partial(FineTuningDataModule, "chats.jsonl")
chat_source = partial(ChatSource, "chats.jsonl")


def mixture(weight: Any = 1, **options: Any) -> MixtureDataModule:
    return MixtureDataModule({"a": TextSource("a", weight=weight)}, **options)


ILLEGAL: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (text, {"packing": "best"}, "packing='best'; legal: 'cut', 'fit'"),
    (text, {"packing": True}, "packing=True; legal: 'cut', 'fit'"),
    (text, {"path": "a", "streaming": "no"}, "streaming='no'; legal: True, False"),
    (text, {"document_mask": "no"}, "document_mask='no'; legal: True, False"),
    (text, {"path": "a", "streaming": True, "shuffle_buffer": -1}, "shuffle_buffer=-1; legal: 0, or a number"),
    (text, {"num_workers": -1}, "num_workers=-1; legal: 0, or a number"),
    (text, {"num_proc": 0}, "num_proc=0 must be at least 1"),
    (text, {"sequence_length": 0}, "sequence_length=0 must be at least 1"),
    (text, {"global_batch_size": 0}, "global_batch_size=0 cannot be shared"),
    (text, {"validation_fraction": 0.9}, "validation_fraction=0.9 is not in (0, 0.5]"),
    (text, {"vocab_size": 3}, "vocab_size=3 is too small; legal are 257 and more"),
    (chats, {"packing": "none"}, "packing='none'; legal: True, False"),
    (chats, {"loss": "answer"}, "loss='answer'; legal: 'answers', 'all'"),
    (chats, {"too_long": "drop"}, "too_long='drop'; legal: 'cut', 'leave_out'"),
    (chats, {"columns": {"message": "chat"}}, "columns={'message': 'chat'}; legal: names for messages; for prompt"),
    (chats, {"chat_template": "llama"}, "chat_template='llama' is no file; legal: one, or chatml"),
    (chats, {"buckets": [8]}, "buckets=[8] need packing=False"),
    (chats, {"buckets": [9, 8], "packing": False}, "buckets=[9, 8]; legal: rising lengths from 1"),
    (chat_source, {"loss": "answer"}, "loss='answer'; legal: 'answers', 'all'"),
    (chat_source, {"loss": "all", "too_long": "drop"}, "too_long='drop'; legal: 'cut', 'leave_out'"),
    (mixture, {"document_mask": "no"}, "document_mask='no'; legal: True, False"),
    (mixture, {"weight": float("nan")}, "weight=nan of source 'a'; legal: 0 or more"),
    (mixture, {"weight": {0: 1, 9: float("inf")}}, "of source 'a'; legal: 0 or more"),
    (partial(MixtureDataModule, {"a": {"path": "a"}}), {}, "source 'a' is dict; legal: TextSource, ChatSource"),
    (partial(MixtureDataModule, {}), {}, "sources={} has none; legal: at least one"),
]


@pytest.mark.parametrize(("make", "options", "words"), ILLEGAL, ids=[words for _, _, words in ILLEGAL])
def test_what_is_not_legal(make: Callable[..., Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        make(**options)
