"""How far a preparation is: rows done, tokens per second, and the time that is left."""

from __future__ import annotations

import sys
import time
from types import TracebackType

_SILENT = 2.0  # s, in which what is small is done
_TERMINAL, _LOG = 0.5, 30.0  # s between two lines


class Progress:
    """Told of every batch; writes to standard error, one line again and again on a terminal, else one in 30 s.

    Args:
        rows: in all.
    """

    def __init__(self, rows: int) -> None:
        self.rows, self._done, self._tokens = rows, 0, 0
        self._began = time.monotonic()
        self._next = self._began + _SILENT
        self._is_terminal, self._has_written = sys.stderr.isatty(), False

    def __call__(self, tokens: int, rows: int) -> None:
        self._tokens, self._done = self._tokens + tokens, self._done + rows
        now = time.monotonic()
        if now >= self._next:
            self._next = now + (_TERMINAL if self._is_terminal else _LOG)
            self._write(now)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._has_written and self._is_terminal:
            print(file=sys.stderr)

    def _write(self, now: float) -> None:
        line = progress_line(self._done, self.rows, self._tokens, now - self._began)
        start, end = ("\r\033[K", "") if self._is_terminal else ("", "\n")
        print(f"{start}{line}", end=end, file=sys.stderr, flush=True)
        self._has_written = True


def progress_line(done: int, rows: int, tokens: int, seconds: float) -> str:
    """One line of it.

    Args:
        done: rows that this process and those it forked have encoded.
        rows: in all.
        tokens: they gave.
        seconds: it took.
    """
    left = seconds * (rows - done) / max(1, done)
    return (
        f"Preparing data: {done:,} of {rows:,} rows ({100 * done / max(1, rows):.0f} %), {tokens / 1e6:.1f} M tokens, "
        f"{tokens / seconds:,.0f} tokens/s, {_duration(left)} left"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d} h" if hours else f"{minutes}:{rest:02d} min"
