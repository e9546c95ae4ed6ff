"""Whole conversations into rows of one length: best fit, the longest first."""

from __future__ import annotations

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Put each item into the row whose room it fills best, the longest items first; a new row where it fits in none.

    Args:
        lengths: [N], 1 to ``capacity`` each.
        capacity: of a row.

    Returns:
        The items row by row, [N] int64; and where each row ends among them, [rows] int64.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows, by the room that they have
    rooms = 0  # bit n: some row has room n
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        if left := room - length:
            with_room[left].append(row)
            rooms |= 1 << left
    order = np.array([item for row in rows for item in row], np.int64)
    return order, np.cumsum([len(row) for row in rows], dtype=np.int64)
