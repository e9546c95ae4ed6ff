"""An error is printed once: by the rank it is of, under a heading, before the others say that they follow."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from lightning_tex.parallel.errors import and_what_led_to_it
from lightning_tex.resilience.processes import say

# On an error: what a line begins with that says what went wrong in handling it; empty: nothing does.
_MARK = "_lightning_tex_told"
_in_one_line: tuple[type[BaseException], ...] = ()
# Characters of another rank's message that a line repeats.
_LONGEST = 1000


@contextmanager
def told_in_one_line(*kinds: type[BaseException]) -> Iterator[None]:
    """Errors of these kinds are what the user can put right: one line and no traceback."""
    global _in_one_line
    before, _in_one_line = _in_one_line, kinds
    try:
        yield
    finally:
        _in_one_line = before


def described(error: BaseException) -> str:
    """Its type and the first line of its message, of which no more than fits a few lines of a terminal."""
    try:
        message = str(error).strip().splitlines()
    except Exception:
        message = ["(its message cannot be made)"]
    return f"{type(error).__name__}: {_shortened(message[0])}" if message else type(error).__name__


def _shortened(line: str) -> str:
    """A line that may be long, cut in its middle."""
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} .. {line[-_LONGEST // 2 :]}"


def tell(error: BaseException, rank: int, host: str, step: int) -> None:
    """Print an error of this rank, and see to it that nobody prints it again."""
    if isinstance(error, _in_one_line):
        say(f"[rank {rank}] error: {error}" if rank else f"error: {error}")
    elif isinstance(error, KeyboardInterrupt | SystemExit):
        say(f"[rank {rank}] ({host}, step {step}) {described(error)}")
    else:
        lines = "".join(traceback.format_exception(error)).rstrip()
        say(f"[rank {rank}] failed ({host}, step {step}):\n{lines}")
    mark_told(error, f"[rank {rank}] in handling it: ")


def mark_told(error: BaseException, then: str = "") -> None:
    """Python's own report of an uncaught error leaves it out, and what it has led to.

    Args:
        error: that has been printed, or is a consequence of one that has.
        then: what a line begins with that tells of an error in handling it; empty: none does.
    """
    setattr(error, _MARK, then)
    if sys.excepthook is not _excepthook:
        global _before
        _before, sys.excepthook = sys.excepthook, _excepthook


def is_told(error: BaseException) -> bool:
    """Whether it has been printed, or is a consequence of one that has."""
    return hasattr(error, _MARK)


_before = sys.__excepthook__


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if is_told(error):
        return
    handled = next(filter(is_told, and_what_led_to_it(error)), None)
    if handled is None:
        _before(kind, error, trace)
    elif then := getattr(handled, _MARK):
        where = traceback.extract_tb(trace)[-1:]
        say(f"{then}{described(error)}{''.join(f' (line {f.lineno} of {f.filename})' for f in where)}")
