"""Best fit against a plain loop."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lightning_tex.data.chat.fitting import best_fit

CAPACITY = 12


def plainly(lengths: list[int]) -> list[int]:
    """The room that is left in each row."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(CAPACITY - length)
    return sorted(rooms)


@given(lengths=st.lists(st.integers(1, CAPACITY), max_size=40))
def test_every_item_once_and_as_tight_as_a_plain_loop(lengths: list[int]) -> None:
    order, ends = best_fit(np.array(lengths, np.int64), CAPACITY)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    rows = np.split(order, ends[:-1]) if len(ends) else []
    filled = [sum(lengths[item] for item in row) for row in rows]
    assert all(0 < room <= CAPACITY for room in filled)
    assert sorted(CAPACITY - room for room in filled) == plainly(lengths)
