"""Windows of the padded parts of a tensor, against plain indexing."""

from __future__ import annotations

from itertools import product
from math import prod

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tex.parallel.box import Box
from lightning_tex.parallel.extent import Extent
from lightning_tex.parallel.topology import Axis


@st.composite
def padded_shards(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[int, int]], int]:
    whole = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    dims = draw(st.lists(st.integers(0, len(whole) - 1), unique=True, max_size=2))
    return whole, [(dim, draw(st.integers(1, 4))) for dim in dims], draw(st.integers(1, 7))


@settings(deadline=None)
@given(padded_shards())
def test_windows_of_all_ranks_make_the_whole_without_padding(
    case: tuple[tuple[int, ...], list[tuple[int, int]], int],
) -> None:
    whole, shard_sizes, window = case
    values = torch.arange(1.0, prod(whole) + 1).view(whole)
    written = torch.zeros(whole)
    times = torch.zeros(whole)
    for ranks in product(*[range(size) for _, size in shard_sizes]):
        axes = [(Axis(str(dim), size, rank), dim) for (dim, size), rank in zip(shard_sizes, ranks, strict=True)]
        box = Box.of(whole, axes)
        flat = (box.shard(values) if box.extent.numel else torch.zeros(box.stored)).flatten()
        for start in range(0, len(flat), window):
            values_here = flat[start : start + window]
            run = Extent.run(start, start + len(values_here))
            for extent, view in box.of_run(run):
                written[extent.slices] = view(values_here)
                times[extent.slices] += 1
    assert torch.equal(written, values)
    assert bool((times == 1).all())
