"""Batches of a stream in parts: the same on every data axis and with any workers, gone on with exactly."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from helpers.cases import case
from pyarrow import parquet

from lightning_tex.data.packing import Batch
from lightning_tex.errors import UserError

STOPS = 20
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork.. may lead to deadlocks:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]


def require_equal(batches: list[Batch], expected: list[Batch]) -> None:
    assert len(batches) == len(expected)
    for step, (batch, other) in enumerate(zip(batches, expected, strict=True)):
        for name, values in other.items():
            assert torch.equal(batch[name], values), (step, name)


def test_batches_are_the_same_on_every_data_axis(ranks: Any) -> None:
    alone, _ = ranks.read(9)
    assert torch.cat([batch["sample"] for batch in alone]).tolist() == list(range(72))
    for count in (2, 4, 8):
        with case(count):
            require_equal(ranks.read(9, count)[0], alone)
    require_equal(ranks.read(9, 2, num_workers=2)[0], alone)


@pytest.mark.full
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("workers", [0, 2, 4])
def test_the_grid_of_axes_parts_and_workers(ranks: Any, parts: int, workers: int) -> None:
    """Also where a rank reads several parts, and where several ranks read one."""
    options = {"stream_parts": parts, "document_mask": True}
    alone, _ = ranks.read(9, **options)
    for count in (1, 2, 4, 8):
        with case(count):
            require_equal(ranks.read(9, count, num_workers=workers, **options)[0], alone)


@pytest.mark.parametrize(
    "workers", [0, pytest.param(2, marks=pytest.mark.full), pytest.param(4, marks=pytest.mark.full)]
)
def test_twenty_stops_on_changing_axes(ranks: Any, workers: int) -> None:
    draw = random.Random(workers)
    whole, _ = ranks.read(60)
    done, state = 0, None
    for stop in range(STOPS):
        count, most = draw.choice([1, 2, 4, 8]), draw.randint(0, 4)
        with case(stop=stop, ranks=count, most=most, at=done):
            batches, state = ranks.read(most, count, state, num_workers=workers)
            require_equal(batches, whole[done : done + most])
            done += most
    assert 20 < done <= 60


def test_an_epoch_has_every_document_once(ranks: Any) -> None:
    """Counted by their names in the text of the blocks, however they were cut: in one part, and in eight."""
    data = ranks.module()
    expected = {
        f"<{file}-{i}>" for file, count in enumerate((50, 9, 70)) for i in range(count) if i % 20 != 10
    }  # fmt: skip
    for parts, steps in ((1, 45), (8, 60)):
        batches, state = ranks.read(steps, stream_parts=parts)
        texts = [""] * parts
        for batch in batches:
            for row, ids in enumerate(batch["input_ids"]):
                texts[row * parts // 8] += data.decode(ids)
        seen = Counter(name for text in texts for name in re.findall(r"<\d-\d+>", text))
        epochs = {one["position"] // (3 * -(-parts // 3)) for one in state["stream"]["parts"]}
        assert seen.keys() == expected
        assert max(seen.values()) <= max(epochs) + 1
        assert min(epochs) >= 1
        assert min(seen.values()) >= 1


@pytest.mark.parametrize(("kind", "group"), [("parquet", 40), ("parquet", 900), ("txt", 0)])
def test_forms_that_datasets_reads(ranks_of: Any, tmp_path: Path, kind: str, group: int) -> None:
    for file in range(40 if kind == "txt" else 3):
        texts = [f"<{file}-{i}> " + "word " * (3 + i % 9) for i in range(5 if kind == "txt" else 90)]
        path = tmp_path / "corpus" / f"{file:02d}.{kind}"
        path.parent.mkdir(exist_ok=True)
        if kind == "parquet":
            parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=group)
        else:
            path.write_text("\n".join(texts))
    ranks = ranks_of(tmp_path / "corpus")
    whole, _ = ranks.read(30)
    for stop in (1, 13, 29):
        batches, state = ranks.read(stop)
        rest, _ = ranks.read(30 - stop, 2, state)
        require_equal(batches + rest, whole)
    assert next(iter(ranks.module().val_dataloader()))["input_ids"].shape == (8, 16)


# --- what a state is refused for


def refused(make: Callable[[], Any]) -> str:
    try:
        make()
    except UserError as error:
        return str(error)  # keeping no frame, and so no loader, whose workers would be ended when it is collected
    raise AssertionError("nothing was refused")


@pytest.fixture
def copied(ranks_of: Any, lines: Path, tmp_path: Path) -> Any:
    for file in lines.glob("*.jsonl"):
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    return ranks_of(tmp_path / "copy")


def test_other_files_are_refused_by_fingerprint(copied: Any) -> None:
    _, state = copied.read(5)
    with (copied.path / "2.jsonl").open("a") as file:
        file.write(json.dumps({"text": "more"}) + "\n")
    assert "the data set has changed: names or sizes of its files" in refused(lambda: copied.read(1, state=state))


def test_other_documents_are_refused_by_the_last_ones_read(copied: Any) -> None:
    """Of the same sizes, as a stream from elsewhere would not tell."""
    tokenizer = copied.module().prepared.tokenizer.tokenizer
    tokenizer.save(str(copied.path.parent / "tokenizer.json"))
    options = {"tokenizer": str(copied.path.parent / "tokenizer.json"), "vocab_size": None}
    _, state = copied.read(5, **options)
    for file in copied.path.glob("*.jsonl"):
        file.write_text(file.read_text().replace("word", "wore"))
    text = refused(lambda: copied.read(1, state=state, **options))
    assert re.search(r"the data has changed: what stands before and at row \d+ \+ \d+ of .*\d.jsonl is not what", text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stream_parts": 4}, "stream_parts=4 but the checkpoint was trained with stream_parts=8"),
        ({"shuffle_buffer": 0}, "shuffle_buffer=0 but the checkpoint was trained with shuffle_buffer=7"),
        ({"seed": 2}, "seed=2 but the checkpoint was trained with seed=0"),
    ],
)
def test_another_order_is_refused(ranks: Any, options: Any, words: str) -> None:
    _, state = ranks.read(3)
    assert words in refused(lambda: ranks.read(1, state=state, **options))


def test_the_order_without_parts_is_refused(ranks: Any) -> None:
    data = ranks.module(stream_parts=None)
    iterator = iter(data.train_dataloader())
    next(iterator)
    state = data.state_dict()
    words = "stream_parts=8 but the checkpoint was trained with stream_parts=None"
    assert words in refused(lambda: ranks.read(1, state=state))
    _, state = ranks.read(3)
    other = ranks.module(stream_parts=None)
    other.load_state_dict(state)
    assert "stream_parts=None but the checkpoint was trained with stream_parts=8" in refused(other.train_dataloader)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stream_parts": 3}, "stream_parts=3 does not divide global_batch_size=8; legal: 1, 2, 4, 8"),
        ({"stream_parts": 2, "streaming": False, "shuffle_buffer": 0}, "stream_parts=2 needs streaming=True"),
    ],
)
def test_parts_that_are_not_legal(ranks: Any, options: Any, words: str) -> None:
    assert words in refused(lambda: ranks.module(**options))


# --- bad data


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "cut sho', r"1\.jsonl, line 3 is no JSON: .*\(was it cut short\?\)"),
        (b'{"body": "other"}\n', r"1\.jsonl, line 3 has no 'text'; it has: body"),
        (b'{"text": 5}\n', r"row 2 of .*1\.jsonl is 5 and no text"),
        (b'{"text": "m\xfc"}\n', r"1\.jsonl, line 3 is not UTF-8: byte 0xfc at offset \d+"),
    ],
    ids=["cut in the middle", "another schema", "no text", "not UTF-8"],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_line_is_named(copied: Any, line: bytes, words: str, workers: int) -> None:
    tokenizer = copied.module().prepared.tokenizer.tokenizer
    tokenizer.save(str(copied.path.parent / "tokenizer.json"))
    file = copied.path / "1.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:2]) + line)
    options = {"tokenizer": str(copied.path.parent / "tokenizer.json"), "vocab_size": None, "num_workers": workers}
    assert re.search(words, refused(lambda: copied.read(30, **options)))


def test_an_empty_file_among_others_is_read_over(copied: Any) -> None:
    (copied.path / "1.jsonl").write_text("")
    assert len(copied.read(30, 4)[0]) == 30
