"""Extents against plain indexing."""

from __future__ import annotations

from math import prod

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tex.parallel.extent import Extent

Shape = tuple[int, ...]


@st.composite
def extents(draw: st.DrawFn, shape: Shape) -> Extent:
    offsets = tuple(draw(st.integers(0, n)) for n in shape)
    return Extent(offsets, tuple(draw(st.integers(0, n - o)) for n, o in zip(shape, offsets, strict=True)))


@st.composite
def runs(draw: st.DrawFn) -> tuple[Shape, Extent, Extent]:
    """A shape, an extent of it, and a run of the extent's elements."""
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    extent = draw(extents(shape))
    start = draw(st.integers(0, extent.numel))
    return shape, extent, Extent.run(start, draw(st.integers(start, extent.numel)))


@settings(deadline=None)
@given(runs())
def test_a_run_is_split_into_extents_that_cover_it_in_order(case: tuple[Shape, Extent, Extent]) -> None:
    shape, extent, run = case
    index = torch.arange(prod(shape)).view(shape)
    parts = list(extent.split(run))
    elements = [index[part.slices].flatten() for part in parts]
    covered = torch.cat([torch.empty(0, dtype=torch.int64), *elements])
    assert torch.equal(covered, index[extent.slices].flatten()[run.slices])
    assert all(len(own) == part.numel > 0 for own, part in zip(elements, parts, strict=True))
    assert len(parts) <= max(1, 2 * len(shape) - 1)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Shape, Extent, Extent]:
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
    return shape, draw(extents(shape)), draw(extents(shape))


@settings(deadline=None)
@given(pairs())
def test_an_intersection_has_the_elements_of_both(case: tuple[Shape, Extent, Extent]) -> None:
    shape, a, b = case
    marks = torch.zeros(shape, dtype=torch.int64)
    marks[a.slices] += 1
    marks[b.slices] += 1
    common = a.intersect(b)
    assert common.numel == int((marks == 2).sum())
    assert bool((marks[common.slices] == 2).all())
    assert common == b.intersect(a)


@settings(deadline=None)
@given(pairs())
def test_elements_counted_from_an_outer_extent_and_back(case: tuple[Shape, Extent, Extent]) -> None:
    shape, outer, other = case
    index = torch.arange(prod(shape)).view(shape)
    common = outer.intersect(other)
    inside = common.within(outer)
    assert inside.shift(outer.offsets) == common
    if common.numel:
        part = index[outer.slices].contiguous()
        assert torch.equal(part[inside.slices], index[common.slices])
        assert outer.strides == part.stride() or 1 in outer.sizes  # torch chooses freely where a dim has one index


def test_by_hand() -> None:
    assert Extent.whole((2, 3)) == Extent((0, 0), (2, 3))
    assert Extent.run(4, 9) == Extent((4,), (5,))
    assert Extent.run(4, 2).numel == 0
    assert Extent.whole(()).numel == 1
    assert Extent((1, 2), (3, 4)).stops == (4, 6)
    assert Extent((1, 2), (3, 4)).strides == (4, 1)
    assert list(Extent.whole((2, 3)).split(Extent.run(1, 5))) == [Extent((0, 1), (1, 2)), Extent((1, 0), (1, 2))]
