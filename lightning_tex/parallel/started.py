"""What has been begun and is waited for later: the collective that gives a new tensor, and what follows from it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from lightning_tex.parallel.replay import outside_replay, replayable, replaying

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class UnderWay(Protocol[T_co]):
    """Something that has begun."""

    def wait(self) -> T_co:
        """What comes of it, when it may be used. Called once."""


@dataclass(frozen=True)
class Ready(Generic[T]):
    """Something that need not be waited for."""

    value: T

    def wait(self) -> T:
        return self.value


@dataclass(frozen=True)
class Then(Generic[T]):
    """What a function makes of something under way, when that is there."""

    under_way: UnderWay[Tensor]
    function: Callable[[Tensor], T]

    def wait(self) -> T:
        return self.function(self.under_way.wait())


@dataclass(frozen=True)
class Together:
    """Several tensors under way."""

    under_way: Sequence[UnderWay[Tensor]]

    def wait(self) -> tuple[Tensor, ...]:
        return tuple(each.wait() for each in self.under_way)


@dataclass(frozen=True)
class _Taped:
    name: str
    like: Tensor
    under_way: UnderWay[Tensor] | None

    def wait(self) -> Tensor:
        def arrived() -> Tensor:
            assert self.under_way is not None
            return self.under_way.wait()

        return replayable(self.name, self.like, arrived)


def started(name: str, like: Tensor, start: Callable[[], UnderWay[Tensor]]) -> UnderWay[Tensor]:
    """:func:`~lightning_tex.parallel.replay.replayable` of something that begins now, unless a tape has it already.

    It is on the tape in the order in which it is waited for.
    """
    if replaying():
        return _Taped(name, like, None)
    with outside_replay():
        return _Taped(name, like, start())


class OneAhead(Generic[T]):
    """Several things that begin one after the other: the next one before somebody takes the one that is there.

    Args:
        starts: begin them; the first at once.
        ahead: False: each begins when it is asked for.
    """

    def __init__(self, starts: Sequence[Callable[[], UnderWay[T]]], ahead: bool = True) -> None:
        self._starts, self._begun = deque(starts), deque[UnderWay[T]]()
        self._ahead = ahead
        if ahead:
            self._begin()

    def _begin(self) -> None:
        if self._starts:
            self._begun.append(self._starts.popleft()())

    def __iter__(self) -> Iterator[T]:
        while self._begun or self._starts:
            self._begin()
            # Not by a name, which would hold what comes of it until the next one has come.
            yield self._begun.popleft().wait()
