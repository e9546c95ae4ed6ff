"""A process that is forked from the tests' and not started anew, which takes five seconds of imports."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any, TextIO


@contextmanager
def forked(function: Callable[..., Any], *args: Any) -> Iterator[tuple[BaseProcess, TextIO]]:
    """A process that calls ``function(*args)``, and what it and all that it starts print. It is killed at the end."""
    reading, writing = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=_printing, args=(writing, function, args))
    process.start()
    os.close(writing)
    with os.fdopen(reading) as output:
        try:
            yield process, output
        finally:
            process.kill()
            process.join()


def _printing(writing: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.dup2(writing, 1)
    os.close(writing)
    function(*args)
