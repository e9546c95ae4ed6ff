"""Errors that the user can put right: a wrong option, layout, file or way to use something.

Each is also the built-in exception that fits, so ``except ValueError`` catches what it always did. The command line
prints them as one line, as it does Lightning's ``MisconfigurationException`` and every ``OSError`` (files and disks);
any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch.distributed as dist


class UserError(Exception):
    """What is wrong, with the option, the numbers, and what is legal."""


class UserValueError(UserError, ValueError):
    """A value or a combination of values that is not legal."""


class UserIndexError(UserError, IndexError):
    """Token ids that the vocabulary does not have."""


class UserTypeError(UserError, TypeError):
    """Something of a kind that is not supported."""


class UserRuntimeError(UserError, RuntimeError):
    """Found only while running: ranks that disagree, a hook that undoes what was done, an infinite gradient."""


class UserFileError(UserError, FileNotFoundError):
    """A file or folder that is not there."""


def require_choice(option: str, given: Any, legal: Collection[Any]) -> None:
    """Refuse a value that is not one of some.

    Raises:
        ValueError: naming the option and what is legal.
    """
    if given not in legal:
        raise UserValueError(f"{option}={given!r}; legal: {', '.join(map(repr, legal))}")


def left_by_another_rank(error: Exception) -> bool:
    """Whether gloo or torch's store says that another rank has closed its connection: a consequence and no cause.

    NCCL does not notice; its launcher or its watchdog ends the process.
    """
    text = str(error)
    return isinstance(error, RuntimeError) and ("losed by peer" in text or "reset by peer" in text)


def and_what_led_to_it(error: BaseException) -> Iterator[BaseException]:
    """An error, the one it came from, and so on; each once, as one may have come from one that it has led to."""
    told: BaseException | None = error
    seen: set[int] = set()
    while told is not None and id(told) not in seen:
        seen.add(id(told))
        yield told
        told = told.__cause__ or told.__context__


def is_consequence(error: BaseException) -> bool:
    """Whether an error, or one it came from, only says that other ranks have gone or do not answer."""
    for told in and_what_led_to_it(error):
        text = str(told)
        network = isinstance(told, dist.DistNetworkError | dist.DistStoreError | dist.DistBackendError)
        if network or (isinstance(told, Exception) and left_by_another_rank(told)) or "gloo/transport" in text:
            return True
        if isinstance(told, UserRuntimeError) and "another rank has gone" in text:
            return True
    return False
