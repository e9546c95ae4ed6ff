"""Loops over cases: which of them are run, and which one failed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def case(*values: Any, **named: Any) -> Iterator[None]:
    """Whatever is raised inside says which case it was: ``with case(layout, mode=mode): ...``."""
    try:
        yield
    except BaseException as error:
        words = [*map(str, values), *(f"{key}={value!r}" for key, value in named.items())]
        error.add_note(f"in the case {', '.join(words)}")
        raise


def in_full(values: Iterable[Any], default: Collection[Any]) -> list[Any]:
    """Parameters of a test, of which only those in ``default`` are run without ``-m full``."""
    return [value if value in default else pytest.param(value, marks=pytest.mark.full) for value in values]


def selected(request: pytest.FixtureRequest, parameter: str) -> set[Any]:
    """Values of a parameter in those tests of a fixture's module that are run: the runs that a fixture has to make."""
    calls = (getattr(item, "callspec", None) for item in request.session.items if item.path == request.path)
    return {call.params[parameter] for call in calls if call is not None and parameter in call.params}


def pairwise(*factors: Any, legal: Callable[..., bool] = lambda *values: True) -> list[tuple[Any, ...]]:
    """A few of all legal combinations of one value of every factor, that together cover every pair of values."""
    values = [list(factor) for factor in factors]

    def combination(places: tuple[int, ...]) -> tuple[Any, ...]:
        return tuple(factor[place] for factor, place in zip(values, places, strict=True))

    every = itertools.product(*(range(len(factor)) for factor in values))
    return [combination(places) for places in cover_pairs([p for p in every if legal(*combination(p))], tuple)]


def cover_pairs(cases: list[Any], values: Callable[[Any], tuple[Any, ...]]) -> list[Any]:
    """A few of some cases that together cover every pair of values that two of these ``values`` have in any of them.

    Greedy and deterministic: always the first case that covers most pairs not covered yet.
    """
    pairs = [set(itertools.combinations(enumerate(values(case)), 2)) for case in cases]
    uncovered = set().union(*pairs)
    chosen = []
    while uncovered:
        best = max(range(len(cases)), key=lambda place: len(pairs[place] & uncovered))
        uncovered -= pairs[best]
        chosen.append(cases[best])
    return chosen
