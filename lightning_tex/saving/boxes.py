"""Rectangles of a tensor: a contiguous range of its flattened elements as a few boxes."""

from __future__ import annotations

from math import prod

Extent = tuple[int, ...]


def range_boxes(shape: Extent, start: int, stop: int) -> list[tuple[Extent, Extent]]:
    """Cover elements ``[start, stop)`` of a flattened tensor by at most ``2 * len(shape) - 1`` boxes.

    Args:
        shape: of the tensor.
        start, stop: flat indices, ``0 <= start``, ``stop <= prod(shape)``.

    Returns:
        (offsets, sizes) of each box. The elements of one box are consecutive, and so are the boxes.
    """
    if start >= stop:
        return []
    if not shape:
        return [((), ())]
    rest = shape[1:]
    row = prod(rest)
    first, last = start // row, stop // row
    head, tail = start % row, stop % row
    if first == last:
        return _in_row(first, range_boxes(rest, head, tail))
    boxes = []
    if head:
        boxes += _in_row(first, range_boxes(rest, head, row))
        first += 1
    if first < last:
        boxes.append(((first, *[0] * len(rest)), (last - first, *rest)))
    return boxes + _in_row(last, range_boxes(rest, 0, tail))


def clipped(offsets: Extent, sizes: Extent, limits: Extent) -> Extent:
    """Sizes of the part of a box whose indices are below ``limits``; some are 0 if there is none."""
    return tuple(max(0, min(size, limit - offset)) for offset, size, limit in zip(offsets, sizes, limits, strict=True))


def _in_row(index: int, boxes: list[tuple[Extent, Extent]]) -> list[tuple[Extent, Extent]]:
    return [((index, *offsets), (1, *sizes)) for offsets, sizes in boxes]
