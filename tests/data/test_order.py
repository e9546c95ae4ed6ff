import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tex.data.order import PADDING, FixedBatchSampler, GlobalBatchSampler, Share, sample_order
from lightning_tex.data.resume import Cursor

sizes = st.integers(1, 200)


def batches(size, share, **options):
    return list(GlobalBatchSampler(range(size), share, **options))


@given(size=sizes, seed=st.integers(-(2**40), 2**40), epoch=st.integers(0, 1000))
def test_order_is_a_permutation_that_depends_on_every_argument(size, seed, epoch):
    order = sample_order(size, seed, epoch, "data")
    assert sorted(order) == list(range(size))
    assert np.array_equal(order, sample_order(size, seed, epoch, "data"))
    if size > 50:
        others = [(seed + 1, epoch, "data"), (seed, epoch + 1, "data"), (seed, epoch, "other")]
        assert not any(np.array_equal(order, sample_order(size, *other)) for other in others)


def plain_hash(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_order_against_plain_integers():
    key = int.from_bytes(hashlib.blake2b(b"5/2/f", digest_size=8).digest(), "little")
    expected = sorted(range(100), key=lambda i: plain_hash(plain_hash(i) ^ key))
    assert sample_order(100, seed=5, epoch=2, fingerprint="f").tolist() == expected


@given(size=sizes, ranks=st.integers(1, 5), rows=st.integers(1, 4), pad=st.booleans(), shuffle=st.booleans())
def test_layouts_read_the_same_global_batches(size, ranks, rows, pad, shuffle):
    batch = ranks * rows
    alone = batches(size, Share(batch), pad=pad, shuffle=shuffle)
    shares = [batches(size, Share(batch, ranks, rank), pad=pad, shuffle=shuffle) for rank in range(ranks)]
    assert [list(itertools.chain(*step)) for step in zip(*shares, strict=True)] == alone
    assert {len(step) for share in shares for step in share} <= {rows}
    read = [i for step in alone for i in step if i != PADDING]
    assert len(set(read)) == len(read) == (size if pad else size // batch * batch)


@given(size=sizes, start=st.integers(0, 30), epoch=st.integers(0, 3))
def test_seeking_yields_the_rest_and_len_stays_whole(size, start, epoch):
    sampler = GlobalBatchSampler(range(size), Share(4), seed=3, fingerprint="f")
    sampler.set_epoch(epoch)
    whole = list(sampler)
    sampler.seek(epoch, start)
    assert list(sampler) == whole[start:]
    assert len(sampler) == len(whole) == len(list(sampler))


def test_padding_is_at_the_end_only():
    assert batches(5, Share(4), shuffle=False, pad=True) == [[0, 1, 2, 3], [4, PADDING, PADDING, PADDING]]
    assert batches(5, Share(4, 4, 3), shuffle=False, pad=True) == [[3], [PADDING]]


def test_a_fixed_sampler_repeats_itself():
    sampler = FixedBatchSampler(range(40), Share(4))
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) == first
    sampler.seek(2, 3)
    assert list(sampler) == first[3:]


@given(start=st.integers(0, 4), period=st.integers(5, 9), count=st.integers(0, 30))
def test_epochs_follow_each_other_within_one_iteration(start, period, count):
    sampler = GlobalBatchSampler(range(40), Share(4), seed=1)
    epochs = []
    for epoch in range(8):
        sampler.set_epoch(epoch)
        epochs += list(sampler)[:period]
    sampler.seek(0, start, period)
    assert list(itertools.islice(sampler, count)) == epochs[start : start + count]


@pytest.mark.parametrize(("size", "ranks", "legal"), [(6, 4, "4 and 8"), (3, 8, "8 and 16"), (0, 2, "2 and 4")])
def test_indivisible_batch_is_refused(size, ranks, legal):
    with pytest.raises(ValueError, match=f"global_batch_size={size} .* size {ranks}; .* nearest {legal}"):
        Share(size, ranks)


@settings(max_examples=50)
@given(start=st.integers(0, 4), before=st.integers(0, 9), done=st.lists(st.integers(0, 12), max_size=6))
def test_cursor_counts_what_is_done(start, before, done):
    steps = before  # of an earlier run
    cursor = Cursor(lambda: steps, lambda: 5, epoch=2, batch=start)
    for some in done:
        total = 10 + start + steps - before
        assert cursor.position() == divmod(total, 5)
        assert cursor.begin() == divmod(total, 5)
        steps += some
    assert cursor.position() == divmod(10 + start + steps - before, 5)


def test_cursor_of_a_stream_that_ends():
    steps = 0
    cursor = Cursor(lambda: steps, lambda: float("inf"))
    assert cursor.begin() == (0, 0)
    steps = 7
    assert cursor.position() == (0, 7)
    cursor.run_out(8)  # noticed before the last batch is trained on
    assert cursor.position() == (0, 7)
    steps = 8
    assert cursor.position() == cursor.begin() == (1, 0)
    steps = 16
    assert cursor.position() == (1, 8)
