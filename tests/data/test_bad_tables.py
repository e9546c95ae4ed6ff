"""CSV, Parquet and Arrow that cannot be what was meant: an error that names the file, the row, and the remedy."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
import torch
from helpers.bad_data import TEXT, data_of, overwrite, refused
from helpers.cases import case
from pyarrow import parquet


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    place = tmp_path / "corpus"
    place.mkdir()
    return place


def parquet_of(corpus: Path, name: str, **columns: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), corpus / name, row_group_size=5)
    return corpus / name


def arrow_of(corpus: Path, name: str, **columns: Any) -> Path:
    table = pyarrow.table(columns)
    with pyarrow.OSFile(str(corpus / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=5)
    return corpus / name


TABLES: dict[str, Callable[..., Path]] = {"parquet": parquet_of, "arrow": arrow_of}
WAYS: list[dict[str, Any]] = [{}, {"streaming": True}, {"streaming": True, "stream_parts": 2}]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("kind", TABLES)
def test_a_row_without_text(corpus: Path, kind: str, way: dict[str, Any]) -> None:
    contents: list[Any] = [TEXT * 9] * 8
    TABLES[kind](corpus, f"a.{kind}", text=contents)
    TABLES[kind](corpus, f"b.{kind}", text=[*contents, None])
    text = refused(lambda: data_of(corpus, num_proc=2, **way))
    assert f"{corpus}/b.{kind}, row 8: 'text' is None and no text; legal: strings in every row" in text


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("kind", TABLES)
def test_tables_that_are_not_whole(corpus: Path, kind: str, way: dict[str, Any]) -> None:
    good = TABLES[kind](corpus, f"a.{kind}", text=[TEXT * 9] * 30)
    other = corpus / f"b.{kind}"
    not_utf_8 = pyarrow.array([b"whole", b"m\xfc\xdfig"] * 9, pyarrow.binary()).cast(pyarrow.string(), safe=False)
    cases: dict[str, Callable[[], Any]] = {
        f"is no whole {kind} file: .*fetch it again, or leave it out": lambda: other.write_bytes(
            good.read_bytes()[:700]
        ),
        r"has the columns body \(string\), and .* has text \(string\)": lambda: TABLES[kind](
            corpus, other.name, body=["x"] * 9
        ),
        r"has what is no text in rows \d+ to \d+: ": lambda: TABLES[kind](corpus, other.name, text=not_utf_8),
    }
    if kind == "parquet":
        cases["has no rows; leave it out"] = lambda: TABLES[kind](
            corpus, other.name, text=pyarrow.array([], pyarrow.string())
        )
    for words, write in cases.items():
        with case(words):
            write()
            assert re.search(f"{other} {words}", refused(lambda: data_of(corpus, **way)))


@pytest.mark.parametrize("splits", [False, True])
def test_a_data_set_that_datasets_has_saved(corpus: Path, splits: bool) -> None:
    rows = [{"text": f"{TEXT * 3}{i}"} for i in range(40)]
    train = datasets.Dataset.from_list(rows)
    saved: Any = datasets.DatasetDict({"train": train, "validation": train.select([0, 1])}) if splits else train
    saved.save_to_disk(str(corpus))
    (corpus.parent / "lines").mkdir()
    (corpus.parent / "lines" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, lines = data_of(corpus), data_of(corpus.parent / "lines")
    if splits:
        assert data.prepared.validation.stream.documents == 2
        assert data.prepared.train.stream.documents == 40
    else:
        assert torch.equal(data.prepared.train[[0, 1]]["labels"], lines.prepared.train[[0, 1]]["labels"])


def test_a_cell_of_nothing_is_a_document_of_none(corpus: Path) -> None:
    (corpus / "a.csv").write_text("id,text\n" + f"1,{TEXT * 9}\n" * 8 + "2,\n3,null\n4\n")
    assert data_of(corpus).prepared.train.stream.documents == 10


def test_csv_with_too_many_columns(corpus: Path) -> None:
    (corpus / "a.csv").write_text("text\nfirst\nsecond, with a comma\n")
    assert "a.csv has 2 columns in line 3, and 1 in its first; quote the text" in refused(lambda: data_of(corpus))


def test_parquet_cut_short(corpus: Path) -> None:
    file = corpus / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [TEXT * 9] * 20}), file)
    file.write_bytes(file.read_bytes()[:-20])
    assert f"{file} is no whole parquet file" in refused(lambda: data_of(corpus))


@pytest.mark.parametrize("streams", WAYS, ids=str)
def test_files_of_several_schemas(corpus: Path, streams: dict[str, Any]) -> None:
    parquet_of(corpus, "a.parquet", text=[TEXT] * 20)
    parquet_of(corpus, "b.parquet", text=[[1]] * 20)
    text = refused(lambda: data_of(corpus, **streams))
    assert f"{corpus}/b.parquet has the columns text (list<element: int64>), and {corpus}/a.parquet has text (" in text
    assert "legal: the same ones in all files" in text


@pytest.mark.parametrize("streams", WAYS, ids=str)
def test_parquet_damaged_in_the_middle(corpus: Path, streams: dict[str, Any]) -> None:
    parquet_of(corpus, "a.parquet", text=[TEXT + str(i) for i in range(200)])
    file = parquet_of(corpus, "b.parquet", text=[TEXT + str(i) for i in range(200)])
    overwrite(file, file.stat().st_size // 3, b"\0" * 200)
    assert f"{file} is no whole parquet file" in refused(lambda: data_of(corpus, **streams))
