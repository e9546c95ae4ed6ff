"""How many bytes each collective sends, counted where it happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Sent(NamedTuple):
    """What one kind of collective did: operation, axis and pass it belongs to.

    ``during`` is ``forward``, ``recompute``, ``backward`` or ``optimizer``.
    """

    operation: str
    axis: str
    during: str


class ByteMeter:
    """Counts calls and bytes sent per rank, by (operation, axis, pass). Off until :meth:`start` or inside
    :meth:`measure`; then exact.

    Costs are those of ring algorithms on an axis of n ranks, S bytes being the whole tensor: all-reduce 2 (n-1)/n S,
    all-gather, reduce-scatter and broadcast (n-1)/n S; all-to-all sends what is not the rank's own.
    """

    def __init__(self) -> None:
        self._counting = False
        self._optimizing = False
        self._calls: dict[Sent, int] = {}
        # Bytes times n: sums stay whole numbers, whatever n divides.
        self._scaled: dict[Sent, int] = {}
        self._size: dict[Sent, int] = {}

    @property
    def counting(self) -> bool:
        """Whether calls are counted now."""
        return self._counting

    def start(self) -> None:
        """Count from now on, and from nothing."""
        self.clear()
        self._counting = True

    def stop(self) -> None:
        """Count no more; what was counted stays."""
        self._counting = False

    def add(self, kind: Sent, scaled_bytes: int, axis_size: int) -> None:
        """Count one call that sent ``scaled_bytes / axis_size`` bytes, if calls are counted now."""
        if not self._counting:
            return
        if self._optimizing:
            kind = kind._replace(during="optimizer")
        self._calls[kind] = self._calls.get(kind, 0) + 1
        self._scaled[kind] = self._scaled.get(kind, 0) + scaled_bytes
        self._size[kind] = axis_size

    def calls(self) -> dict[Sent, int]:
        """Calls by kind."""
        return dict(self._calls)

    def sent_bytes(self) -> dict[Sent, float]:
        """Bytes this rank sent, by kind."""
        return {kind: scaled / self._size[kind] for kind, scaled in self._scaled.items()}

    def clear(self) -> None:
        """Forget what was counted."""
        self._calls.clear()
        self._scaled.clear()

    @contextmanager
    def measure(self) -> Iterator[ByteMeter]:
        """Count inside, on top of what was counted before."""
        before, self._counting = self._counting, True
        try:
            yield self
        finally:
            self._counting = before

    @contextmanager
    def optimizer_pass(self) -> Iterator[None]:
        """What is sent inside belongs to the optimizer."""
        before, self._optimizing = self._optimizing, True
        try:
            yield
        finally:
            self._optimizing = before
