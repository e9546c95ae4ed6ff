"""Which rank steps which matrix: the size-balanced choice that the optimizer makes and the planner foresees."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heapreplace
from math import prod

from lightning_tex.parallel.topology import Axis

_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 24}


def at_once(device: str) -> int:
    """Elements of the matrices that a rank gathers at once; one matrix may have more."""
    return _AT_ONCE.get(device, _AT_ONCE["cuda"])


def assigned(lengths: Sequence[int], loads: list[int]) -> list[int]:
    """An owner for every matrix: the largest first, each to the owner that has the least so far.

    Args:
        lengths: elements of each matrix.
        loads: elements that each owner has already; what is assigned is added.
    """
    owners = [0] * len(lengths)
    least = [(load, owner) for owner, load in enumerate(loads)]
    heapify(least)
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        load, owner = least[0]
        owners[place], loads[owner] = owner, load + lengths[place]
        heapreplace(least, (loads[owner], owner))
    return owners


def rounds(lengths: Sequence[int], owners: Sequence[int], most: int) -> list[list[int]]:
    """Which matrices travel together: of each owner one or, where they are small, several; by their places.

    Args:
        lengths, owners: of each matrix.
        most: elements of one owner in one round, unless a single matrix has more.
    """
    queues: dict[int, list[int]] = {}
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        queues.setdefault(owners[place], []).append(place)
    found: list[list[int]] = []
    room: dict[int, int] = {}
    for turn in range(max(map(len, queues.values()), default=0)):
        now = [queue[turn] for queue in queues.values() if turn < len(queue)]
        if not found or any(lengths[place] > room[owners[place]] for place in now):
            found.append([])
            room = dict.fromkeys(queues, most)
        found[-1] += now
        for place in now:
            room[owners[place]] -= lengths[place]
    return found


def coordinates(owner: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """An owner's rank on each of the axes that matrices are gathered over, of these sizes."""
    return tuple(owner // prod(sizes[place + 1 :]) % size for place, size in enumerate(sizes))


class Loads:
    """How many elements of the matrices of a group each rank owns so far; ranks of other axes are counted apart."""

    def __init__(self) -> None:
        self._of: dict[tuple[str, ...], list[int]] = {}

    def assign(self, lengths: Sequence[int], axes: Sequence[Axis]) -> list[int]:
        """An owner for every matrix of a buffer, by :func:`assigned`: a number over all the axes."""
        names = tuple(axis.name for axis in axes)
        return assigned(lengths, self._of.setdefault(names, [0] * prod(axis.size for axis in axes)))
