import itertools
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_tex.data.corpus import Source, cut_at_lines, held_out, standard_library_files
from lightning_tex.data.prepared import Preparation
from lightning_tex.data.tokenizer import texts_of


def texts(source, tmp_path):
    documents = source.load(tmp_path)
    return list(texts_of(documents.train)), list(texts_of(documents.validation))


def test_standard_library_is_real_text_of_the_size_asked_for():
    files = standard_library_files(3_000_000)
    assert files == standard_library_files(3_000_000)
    assert 2_700_000 < sum(file.stat().st_size for file in files) <= 3_000_000
    assert not any({"test", "tests", "site-packages", "idle_test"} & set(file.parts) for file in files)
    assert len({file.parent for file in files}) > 20  # spread over the packages
    initials = {file.name[0] for file in files}
    assert {"a", "s", "t"} <= initials


def test_held_out_files_are_disjoint_and_spread(tmp_path):
    source = Source(max_bytes=500_000)
    train, validation = texts(source, tmp_path)
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(f.read_text() for f in standard_library_files(500_000))
    assert (train, validation) == texts(source, tmp_path)
    assert source.load(tmp_path).key != Source(max_bytes=600_000).load(tmp_path).key


@given(count=st.integers(2, 500), fraction=st.floats(0.01, 0.5))
def test_held_out_positions(count, fraction):
    positions = held_out(count, fraction)
    gaps = {b - a for a, b in itertools.pairwise(positions)}
    assert 1 <= len(positions) < count
    assert len(gaps) <= 1
    assert abs(len(positions) - count * fraction) <= 1 + 0.3 * count * fraction


@given(text=st.text("ab\n", max_size=300), pieces=st.integers(1, 20))
def test_cutting_at_lines_loses_nothing(text, pieces):
    parts = cut_at_lines(text, pieces)
    assert "".join(parts) == text
    assert len(parts) <= pieces
    assert all(part.endswith("\n") for part in parts[:-1])


def test_folder_of_text_files(folder, documents, tmp_path):
    train, validation = texts(Source(str(folder)), tmp_path)
    assert sorted(train + validation) == sorted(documents)
    assert len(validation) == 3


def test_one_long_file_is_cut_into_documents(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("".join(f"line {i}\n" for i in range(1000)))
    train, validation = texts(Source(str(file)), tmp_path / "cache")
    assert (len(train), len(validation)) == (19, 1)
    assert len("".join(train + validation)) == file.stat().st_size


@pytest.mark.parametrize("streaming", [False, True])
def test_jsonl_in_load_dataset_words(jsonl, documents, tmp_path, streaming):
    source = Source("json", data_files=str(jsonl), text_column="body", streaming=streaming)
    train, validation = texts(source, tmp_path)
    assert validation == documents[10::20]
    assert train == [text for text in documents if text not in validation]


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_by_name(jsonl, folder, documents, tmp_path, streaming):
    files = {"train": str(jsonl), "validation": str(jsonl), "exam": str(jsonl)}
    source = Source("json", data_files=files, text_column="body", test_split="exam", streaming=streaming)
    loaded = source.load(tmp_path)
    assert list(texts_of(loaded.train)) == list(texts_of(loaded.validation)) == list(texts_of(loaded.test)) == documents


def test_split_slices(jsonl, documents, tmp_path):
    source = Source(
        "json", data_files=str(jsonl), text_column="body", split="train[:50%]", validation_split="train[50%:]"
    )
    assert texts(source, tmp_path) == (documents[:30], documents[30:])


def test_refusals(jsonl, tmp_path):
    with pytest.raises(ValueError, match="text_column='text' is not a column of the data set; it has: body, id"):
        Source(str(jsonl)).load(tmp_path)
    with pytest.raises(ValueError, match=r"validation_fraction=0.9 is not in \(0, 0.5\]"):
        Source(validation_fraction=0.9)
    with pytest.raises(ValueError, match="streaming, name and data_files need a path"):
        Source(streaming=True)
    with pytest.raises(ValueError, match="split='nosuch'"):
        Source(str(jsonl), split="nosuch", text_column="body").load(tmp_path)
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.txt").touch()
    (tmp_path / "mixed" / "b.jsonl").touch()
    with pytest.raises(ValueError, match="1 text, 1 json files; name one kind"):
        Source(str(tmp_path / "mixed")).load(tmp_path)
    with pytest.raises(ValueError, match="max_bytes=10 holds 0 files"):
        Source(max_bytes=10).load(tmp_path)


def test_a_cache_among_the_data_is_no_data(folder, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    before = texts(Source(str(data)), tmp_path / "elsewhere")
    cache = data / "cache"
    Preparation(Source(str(data)), None, 300, None, 8).run(cache, None)
    (data / ".git").mkdir()
    (data / ".git" / "index.json").write_text("{}")
    assert list(cache.rglob("*.json"))
    assert texts(Source(str(data)), cache / "sources") == before
