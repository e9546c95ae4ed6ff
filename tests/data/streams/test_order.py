"""Parts of a stream read every document of an epoch once, and stand where their state says."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tex.data.streams.held_out import HeldOut, HeldOutDocuments, SomeShards, divided
from lightning_tex.data.streams.order import StreamOrder
from lightning_tex.data.streams.parts import PartBlocks, PartDocuments, PartState
from lightning_tex.data.streams.shards import Shards
from lightning_tex.data.tokenizer import TextTokenizer, train_bpe
from lightning_tex.errors import UserValueError

sizes = st.lists(st.integers(0, 12), min_size=1, max_size=7).filter(lambda counts: sum(counts) > 0)


class Listed(Shards):
    """Shards of so many documents, whose texts name them."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.count = sizes, len(sizes)

    def read(self, shard: int, place: Any = None) -> Iterator[tuple[Any, Any]]:
        for row in range(place or 0, self.sizes[shard]):
            yield partial(str, f"{shard}-{row} " + "x" * (row % 5)), row + 1

    def name_of(self, shard: int) -> str:
        return f"shard {shard}"


def documents(shards: Shards, order: StreamOrder, part: int) -> Iterator[str]:
    for window in PartDocuments(shards, order).windows(PartState(part)):
        yield from window.texts


def of_positions(shards: Shards, order: StreamOrder, part: int) -> Iterator[tuple[int, str]]:
    """The epoch of each document, and its text."""
    for text, behind in PartDocuments(shards, order)._documents(PartState(part)):
        yield behind.position // order.units, text


@given(sizes=sizes, parts=st.integers(1, 9), buffer=st.sampled_from([0, 3]), stride=st.sampled_from([0, 2, 3]))
def test_every_document_once_an_epoch(sizes: list[int], parts: int, buffer: int, stride: int) -> None:
    shards, held_out = Listed(sizes), HeldOut(stride)
    order = StreamOrder(parts, len(sizes), 5, buffer, held_out)
    expected = {f"{s}-{r}" for s, n in enumerate(sizes) for r in range(n) if not held_out.has(r)}
    if not expected:
        return
    counts: list[Counter[str]] = [Counter(), Counter()]
    for part in range(parts):
        with suppress(UserValueError):  # all of its units are empty, for ever
            for epoch, text in of_positions(shards, order, part):
                if epoch >= 2:
                    break
                counts[epoch][text.split()[0]] += 1
    assert counts == [Counter(expected)] * 2


@given(sizes=sizes, parts=st.integers(1, 9), buffer=st.integers(2, 5))
def test_shuffles_change_the_order_and_nothing_else(sizes: list[int], parts: int, buffer: int) -> None:
    orders = [[StreamOrder(parts, len(sizes), seed, buffer).unit(i) for i in range(40)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1]
    units = StreamOrder(parts, len(sizes)).units
    assert sorted(orders[0][:units]) == sorted(orders[2][:units]) if units <= 40 else True
    order = StreamOrder(parts, len(sizes), 1, buffer)
    assert sorted(order.within(3, 2, buffer)) == list(range(buffer))
    assert any(order.within(position, 0, 5) != list(range(5)) for position in range(9))


@given(rows=st.integers(0, 200), stride=st.integers(2, 21))
def test_what_is_held_out_is_counted(rows: int, stride: int) -> None:
    held_out = HeldOut(stride)
    assert held_out.before(rows) == sum(held_out.has(row) for row in range(rows))


@pytest.mark.parametrize("sizes", [[40], [25, 3, 5, 17], [1] * 30])
def test_what_is_held_out_is_not_trained_on(sizes: list[int]) -> None:
    shards = Listed(sizes)
    train, rows, held_out = divided(shards, 4)
    order = StreamOrder(3, train.count, held_out=rows)
    trained = {
        text
        for part in range(3)
        for epoch, text in itertools.takewhile(lambda found: found[0] < 1, of_positions(train, order, part))
    }
    validated = [text() for text in held_out]
    everything = {row() for shard in range(len(sizes)) for row, _ in shards.read(shard)}
    assert trained | set(validated) == everything
    assert not trained & set(validated)
    assert len(validated) == len(set(validated)) > 0
    assert isinstance(train, SomeShards) == (len(sizes) >= 4)


def test_held_out_documents_of_a_split_are_all_of_it() -> None:
    texts = HeldOutDocuments(Listed([3, 2]), None)
    assert [text().split()[0] for text in texts] == ["0-0", "0-1", "0-2", "1-0", "1-1"]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(train_bpe(["0123456789 - x xx xxx"], 270))


@settings(max_examples=40)
@given(parts=st.integers(1, 4), buffer=st.sampled_from([0, 3]), length=st.integers(1, 40), stop=st.integers(0, 30))
def test_blocks_are_the_tokens_of_the_documents_and_go_on_from_any_state(
    tokenizer: TextTokenizer, parts: int, buffer: int, length: int, stop: int
) -> None:
    shards, order = Listed([9, 4, 11]), StreamOrder(parts, 3, 2, buffer)
    blocks, part = PartBlocks(PartDocuments(shards, order), tokenizer, length), parts - 1
    read = list(itertools.islice(blocks.read(PartState(part)), 31))
    tokens = np.concatenate([[block[0] for block, _ in read][:1], *(block[1:] for block, _ in read)])
    texts = itertools.islice(documents(shards, order, part), 31 * (length + 1))
    expected = [token for ids in tokenizer.encode_documents(list(texts)) for token in ids]
    assert tokens.tolist() == expected[: len(tokens)]
    again = list(itertools.islice(blocks.read(read[stop][1]), 30 - stop))
    assert [b.tolist() for b, _ in again] == [b.tolist() for b, _ in read[stop + 1 :]]
    assert [state for _, state in again] == [state for _, state in read[stop + 1 :]]


def test_a_part_without_documents_is_refused() -> None:
    order = StreamOrder(4, 4)
    assert next(documents(Listed([1, 0, 3, 1]), order, 0))
    with pytest.raises(UserValueError, match="part 1 of stream_parts=4 has no documents in 4 shards; legal: fewer"):
        next(documents(Listed([1, 0, 3, 1]), order, 1))


def test_a_row_that_is_no_text_is_named() -> None:
    class Broken(Listed):
        def read(self, shard: int, place: Any = None) -> Iterator[tuple[Any, Any]]:
            for row, behind in super().read(shard, place):
                yield (lambda: None) if (shard, behind) == (1, 3) else row, behind

    with pytest.raises(UserValueError, match="row 2 of shard 1 is None and no text; legal: strings in every row"):
        list(itertools.islice(documents(Broken([2, 4]), StreamOrder(1, 2), 0), 70))
