"""Requests to a file system over a network: repeated, with growing waits, where they fail in a way that may pass."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from lightning_tex.parallel.errors import UserError

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

ATTEMPTS = 5
# Before the second attempt, give or take a half; twice as long before each further one.
FIRST_WAIT_S = 0.5

# What another attempt would meet again.
_DEFINITE = (
    *(FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError),
    *(NotImplementedError, ValueError, TypeError, AttributeError, ImportError, UserError),
)
# Not the run's random numbers, which go on after a resume as they would have.
_JITTER = random.SystemRandom()


def repeated(request: Callable[[], _Result], what: object) -> _Result:
    """``request()``, up to :data:`ATTEMPTS` times.

    Args:
        request: may be made again.
        what: names it in messages.

    Raises:
        OSError: the last attempt failed, too. What no attempt could mend is raised as it is, at once.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return request()
        except _DEFINITE:
            raise
        except Exception as error:
            text = f"{what}: {type(error).__name__}: {error}"
            if attempt == ATTEMPTS:
                raise OSError(f"{text}, in {ATTEMPTS} attempts") from error
            _log.info("%s; attempt %d of %d", text, attempt, ATTEMPTS)
            time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1) * _JITTER.uniform(0.5, 1.5))
    raise AssertionError("a last attempt returns or raises")
