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
    """Counts calls and bytes sent per rank, by (operation, axis, pass). Off until :meth:`measure`; then exact.

    Costs are those of ring algorithms on an axis of n ranks, S bytes being the whole tensor: all-reduce 2 (n-1)/n S,
    all-gather, reduce-scatter and broadcast (n-1)/n S; all-to-all sends what is not the rank's own.
    """

    def __init__(self) -> None:
        self.on = False
        self.optimizing = False
        self._calls: dict[Sent, int] = {}
        # Bytes times n: sums stay whole numbers, whatever n divides.
        self._scaled: dict[Sent, int] = {}
        self._size: dict[Sent, int] = {}

    def add(self, kind: Sent, scaled_bytes: int, axis_size: int) -> None:
        """Count one call that sent ``scaled_bytes / axis_size`` bytes."""
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
        """Count inside."""
        before, self.on = self.on, True
        try:
            yield self
        finally:
            self.on = before

    @contextmanager
    def optimizer_pass(self) -> Iterator[None]:
        """What is sent inside belongs to the optimizer."""
        before, self.optimizing = self.optimizing, True
        try:
            yield
        finally:
            self.optimizing = before
