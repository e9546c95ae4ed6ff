"""Loops over cases: which of them are run, and which one failed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def case(*values: Any, **named: Any) -> Iterator[None]:
    """Whatever is raised inside says which case it was: ``with case(layout, mode=mode): ...``."""
    try:
        yield
    except BaseException as error:
        words = [*map(str, values), *(f"{key}={value!r}" for key, value in named.items())]
        error.add_note(f"in the case {', '.join(words)}")
        raise


def pairwise(*factors: Any, legal: Callable[..., bool] = lambda *values: True) -> list[tuple[Any, ...]]:
    """A few of all combinations, that together cover every pair of two factors' values.

    Greedy and deterministic: always the first combination that covers most pairs not covered yet. Pairs that no
    ``legal`` combination has are left out.
    """
    values = [list(factor) for factor in factors]
    combinations = [
        places
        for places in itertools.product(*(range(len(factor)) for factor in values))
        if legal(*(factor[place] for factor, place in zip(values, places, strict=True)))
    ]
    pairs = {places: set(itertools.combinations(enumerate(places), 2)) for places in combinations}
    uncovered = set().union(*pairs.values())
    chosen = []
    while uncovered:
        best = max(combinations, key=lambda places: len(pairs[places] & uncovered))
        uncovered -= pairs[best]
        chosen.append(tuple(factor[place] for factor, place in zip(values, best, strict=True)))
    return chosen
