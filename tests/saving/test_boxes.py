"""Ranges as boxes, and the boxes of a padded part: against plain indexing."""

from __future__ import annotations

from itertools import product
from math import prod

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tex.parallel.sharding import Box
from lightning_tex.parallel.topology import Axis
from lightning_tex.saving.boxes import range_boxes
from lightning_tex.saving.sharded import range_parts


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    start = draw(st.integers(0, prod(shape)))
    return shape, start, draw(st.integers(start, prod(shape)))


@settings(deadline=None)
@given(ranges())
def test_boxes_cover_the_range_in_order(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    index = torch.arange(prod(shape)).view(shape)
    boxes = range_boxes(shape, start, stop)
    found = [index[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].flatten() for box in boxes]
    assert torch.cat([torch.empty(0, dtype=torch.int64), *found]).tolist() == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@st.composite
def padded_cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[int, int]], int]:
    whole = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    dims = draw(st.lists(st.integers(0, len(whole) - 1), unique=True, max_size=2))
    return whole, [(dim, draw(st.integers(1, 4))) for dim in dims], draw(st.integers(1, 7))


@settings(deadline=None)
@given(padded_cuts())
def test_pieces_of_all_ranks_make_the_whole_without_padding(
    case: tuple[tuple[int, ...], list[tuple[int, int]], int],
) -> None:
    whole, cuts, window = case
    values = torch.arange(1.0, prod(whole) + 1).view(whole)
    written = torch.zeros(whole)
    times = torch.zeros(whole)
    for ranks in product(*[range(size) for _, size in cuts]):
        axes = [(Axis(str(dim), size, rank), dim) for (dim, size), rank in zip(cuts, ranks, strict=True)]
        box = Box.of(whole, axes)
        flat = (box.shard(values) if all(box.sizes) else torch.zeros(box.stored)).flatten()
        for start in range(0, len(flat), window):
            values_here = flat[start : start + window]
            for part in range_parts(box, start, len(values_here), lambda values_here=values_here: values_here):
                at = tuple(slice(o, o + n) for o, n in zip(part.offsets, part.sizes, strict=True))
                written[at] = part.read()
                times[at] += 1
    assert torch.equal(written, values)
    assert bool((times == 1).all())
