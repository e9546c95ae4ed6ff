"""Facts that ranks can compare: plain values in words that are alike wherever the values are."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from enum import Enum
from typing import Any

import torch
from torch import Tensor

# What a rank has under which name, in words.
Facts = Mapping[str, str]

# Longer lists are data and no options.
_LONGEST = 64


def describe(value: object) -> str | None:
    """A plain value in words: a number, text, type, or a short collection of those; ``None``: it is no plain value."""
    if isinstance(value, (Enum, timedelta, torch.device)):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype)):
        return repr(value)
    if isinstance(value, type):
        return class_name(value)
    if isinstance(value, Tensor):
        return repr(value.item()) if value.numel() == 1 and not value.is_meta else None
    if isinstance(value, Mapping):
        return _collection(value.items(), "{}")
    if isinstance(value, (set, frozenset)):
        parts = [describe(element) for element in value]
        return None if None in parts or len(parts) > _LONGEST else "{" + ", ".join(sorted(map(str, parts))) + "}"
    return _collection(value, "()") if isinstance(value, (list, tuple)) else None


def _collection(values: Any, brackets: str) -> str | None:
    if len(values) > _LONGEST:
        return None
    parts = [describe(value) for value in values]
    return None if None in parts else brackets[0] + ", ".join(map(str, parts)) + brackets[1]


def described(values: Mapping[Any, Any], prefix: str = "") -> dict[str, str]:
    """Those of some named values that are plain, in words, each under ``prefix`` and its name."""
    words = {f"{prefix}{name}": describe(value) for name, value in values.items()}
    return {name: text for name, text in words.items() if text is not None}


def public(instance: object, prefix: str = "") -> dict[str, str]:
    """The plain values among an object's own public attributes, in words.

    Those that ``alike_on_all_ranks()`` of an attribute gives count as the object's own.
    """
    own = {name: value for name, value in vars(instance).items() if not name.startswith("_")}
    words = described(own, prefix)
    for value in own.values():
        if callable(told := getattr(value, "alike_on_all_ranks", None)):
            words |= described(told(), prefix)
    return words


def class_name(kind: type) -> str:
    """A class by its module and name."""
    return f"{kind.__module__}.{kind.__qualname__}"
