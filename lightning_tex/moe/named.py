"""What a recipe names instead of making it: a class by its import path, alone or with arguments of its own."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, TypeVar

from lightning_tex.parallel.errors import UserValueError

T = TypeVar("T")


def taken_apart(choice: Any, option: str) -> tuple[Any, Mapping[str, Any]]:
    """A name or class, and its further arguments.

    Args:
        choice: it, or ``{"name": .., "init_args": {..}}``.
        option: what it is given as.

    Raises:
        ValueError: other keys, or no name.
    """
    if not isinstance(choice, Mapping):
        return choice, {}
    unknown = ", ".join(map(repr, sorted(set(choice) - {"name", "init_args"})))
    if unknown or "name" not in choice:
        raise UserValueError(
            f"{option} has {unknown or 'no name'}; legal: name, and init_args, the arguments of what it names"
        )
    return choice["name"], choice.get("init_args") or {}


def class_named(path: str, kind: type[T]) -> type[T] | None:
    """The class of a kind that an import path names; ``None``: there is none."""
    module, _, own = path.rpartition(".")
    try:
        found = getattr(import_module(module), own) if module else None
    except (ImportError, AttributeError):
        return None
    return found if isinstance(found, type) and issubclass(found, kind) else None


def plain_choice(choice: Any, option: str, instance: str = "") -> str | dict[str, Any]:
    """A choice as plain values, which files hold and every layer makes its own of.

    Args:
        choice: a name, a class, or either with arguments.
        option: what it is given as.
        instance: what is said of an instance.

    Raises:
        ValueError: an instance, or a class without an import path.
    """
    if isinstance(choice, str):
        return choice
    if isinstance(choice, Mapping):
        return {key: plain_choice(value, option) if key == "name" else value for key, value in choice.items()}
    path = f"{choice.__module__}.{choice.__qualname__}" if isinstance(choice, type) else ""
    if not path or "<locals>" in path:
        raise UserValueError(
            f"{option}={choice!r} is no plain value; legal: a name, a class at the top of a module, or one of these "
            f'with arguments, {{"name": .., "init_args": {{..}}}}{instance}'
        )
    return path
