"""Whose time it is: a stack of parts that are being run, and how long each was on top."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal, NamedTuple

import torch

from lightning_tex.bench.moments import Moment
from lightning_tex.parallel.flight_record import TRAINING
from lightning_tex.parallel.replay import current_pass

During = Literal["forward", "recompute", "backward", "between"]
COMMUNICATION = "exposed communication"


class Part(NamedTuple):
    """A part of a step, in one of its passes."""

    name: str
    during: During


class PartTimeline:
    """Moments at which the part changes that the device works for. Nothing waits for the device but :meth:`read`.

    Args:
        device: where.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._running: list[Part] = []
        self._changes: list[tuple[Moment, Part]] = []

    @property
    def active(self) -> bool:
        """Whether anything is being timed."""
        return bool(self._running)

    def phase(self, part: Part) -> None:
        """From now on time is that part's, but for parts that are entered meanwhile."""
        self._running = [part]
        self._note()

    def enter(self, name: str, during: During | None = None) -> None:
        """Into a part; ``during``: left out, in the pass that is being run."""
        if self.active:
            self._running.append(Part(name, during or self._running[-1].during))
            self._note()

    def leave(self, name: str) -> None:
        """Out of the part that was entered last under this name, and of what was entered after it and not left."""
        names = [part.name for part in self._running]
        if name in names[1:]:
            del self._running[len(names) - 1 - names[::-1].index(name) :]
            self._note()

    def stop(self) -> None:
        """Nothing is timed from now on."""
        if self.active:
            self._note()
        self._running = []

    def read(self) -> dict[Part, float]:
        """Seconds of each part since the first phase, or since the last time; once the device was waited for."""
        seconds: dict[Part, float] = defaultdict(float)
        for (begin, part), (end, _) in zip(self._changes, self._changes[1:], strict=False):
            seconds[part] += end - begin
        self._changes = []
        return dict(seconds)

    def _note(self) -> None:
        self._changes.append((Moment(self.device), self._running[-1]))

    def marked(self, name: str, function: Callable[..., Any], during: During | None = None) -> Callable[..., Any]:
        """A function whose time is a part's."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter(name, during)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave(name)

        return timed

    def recomputed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A block's forward, which is timed by itself where it is repeated."""
        again = self.marked(name, function, "recompute")

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            return (function if current_pass() == "forward" else again)(*args, **kwargs)

        return timed

    @contextmanager
    def of_collectives(self) -> Iterator[None]:
        """Inside, the time from a collective's begin to its end, or that in which it is waited for, is a part's own."""
        names = ("enter", "wait", "leave")
        enter, wait, leave = (getattr(TRAINING, name) for name in names)

        def entered(*args: Any, **kwargs: Any) -> None:
            enter(*args, **kwargs)
            self.enter(COMMUNICATION)

        def waits(*args: Any) -> None:
            wait(*args)
            self.enter(COMMUNICATION)

        def left() -> None:
            self.leave(COMMUNICATION)
            leave()

        for name, function in zip(names, (entered, waits, left), strict=True):
            setattr(TRAINING, name, function)
        try:
            yield
        finally:
            for name in names:
                delattr(TRAINING, name)
