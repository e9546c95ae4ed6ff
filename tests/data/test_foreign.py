"""Tokens that Megatron and datatrove have written, read as they lie; and files of theirs that are damaged."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_tex.data import TextDataModule
from lightning_tex.data.tokenizer import train_bpe
from lightning_tex.data.tokens.foreign import foreign_files, open_foreign, sampled_fingerprint
from lightning_tex.errors import UserError

DOCUMENTS = [list(range(i, i + 3 + i * 5 % 17)) for i in range(40)]
STREAM = [token for document in DOCUMENTS for token in document]


def write_megatron(path: Path, documents: list[list[int]], dtype: str = "<u2", code: int = 8) -> Path:
    """Each document is two sequences, of its first token and of the others."""
    sequences = [part for document in documents for part in (document[:1], document[1:])]
    np.array([t for part in sequences for t in part], dtype).tofile(path)
    lengths = np.array([len(part) for part in sequences], "<i4")
    offsets = np.cumsum([0, *lengths[:-1]], dtype="<i8") * np.dtype(dtype).itemsize
    firsts = np.arange(0, len(sequences) + 1, 2, dtype="<i8")
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(firsts))
    parts = (lengths.tobytes(), offsets.astype("<i8").tobytes(), firsts.tobytes())
    path.with_suffix(".idx").write_bytes(header + b"".join(parts))
    return path


def write_datatrove(path: Path, documents: list[list[int]], dtype: str = "<u2", loss: bool = False) -> Path:
    tokens = np.array([t for document in documents for t in document], dtype)
    tokens.tofile(path)
    np.cumsum([len(document) for document in documents]).astype("<u8").tofile(f"{path}.index")
    Path(f"{path}.metadata").write_text(f"gpt2|{np.dtype(dtype).itemsize}\n{len(tokens)}\n1 kT")
    if loss:
        (tokens % 3 > 0).tofile(f"{path}.loss")
    return path


WRITERS: dict[str, Any] = {
    "megatron": lambda folder: write_megatron(folder / "all.bin", DOCUMENTS),
    "megatron, int32": lambda folder: write_megatron(folder / "all.bin", DOCUMENTS, "<i4", 4),
    "datatrove": lambda folder: write_datatrove(folder / "all.ds", DOCUMENTS),
    "datatrove, four bytes": lambda folder: write_datatrove(folder / "all.ds", DOCUMENTS, "<u4"),
    "several": lambda folder: [write_datatrove(folder / f"{i}.ds", DOCUMENTS[10 * i : 10 * i + 10]) for i in range(4)],
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_stream_of_others(tmp_path: Path, kind: str) -> None:
    WRITERS[kind](tmp_path)
    stream = open_foreign(foreign_files(tmp_path))
    assert stream.read(0, len(stream)).tolist() == STREAM
    assert stream.ends().tolist() == np.cumsum([len(document) for document in DOCUMENTS]).tolist()
    for documents in (1, 10, 25, 39):
        first, rest = stream.divided(documents)
        assert first.documents == documents and rest.documents == 40 - documents
        assert [*first.read(0, len(first)), *rest.read(0, len(rest))] == STREAM
        assert first.ends()[-1] == len(first) and rest.ends()[-1] == len(rest)
    other = open_foreign([write_datatrove(tmp_path / "other.ds", [[*STREAM[:-1], 99]])])
    assert sampled_fingerprint(stream, 8) not in (sampled_fingerprint(other, 8), sampled_fingerprint(stream, 9))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("kind", ["megatron", "datatrove"])
def test_training_on_them(tmp_path: Path, kind: str) -> None:
    WRITERS[kind](tmp_path)
    data = module_of(tmp_path)
    train, validation = data.prepared.train, data.prepared.validation
    batch = train[list(range(len(train)))]
    assert batch["input_ids"].flatten().tolist() == STREAM[: len(train) * 8]
    held_out = [token for document in DOCUMENTS[-2:] for token in document]
    labels = validation[list(range(len(validation)))]["labels"]
    assert labels[labels >= 0].tolist() == held_out[1:]
    assert len(list(data.train_dataloader())) == len(train) // 4
    assert not cache_of(tmp_path).exists()


def cache_of(folder: Path) -> Path:
    return folder.with_name(f"cache of {folder.name}")


def module_of(folder: Path, **options: Any) -> TextDataModule:
    tokenizer = folder.with_name(f"{folder.name}.json")
    train_bpe(["text"], 300).save(str(tokenizer))
    usual = {"tokenizer": str(tokenizer), "sequence_length": 8, "global_batch_size": 4}
    return TextDataModule(str(folder), **{**usual, "cache_dir": str(cache_of(folder)), **options})


def test_what_is_not_to_be_predicted(tmp_path: Path) -> None:
    write_datatrove(tmp_path / "all.ds", DOCUMENTS, loss=True)
    train = module_of(tmp_path).prepared.train
    batch = train[list(range(len(train)))]
    following = torch.tensor(STREAM[1 : len(train) * 8 + 1]).view(-1, 8)
    assert torch.equal(batch["labels"], following.masked_fill(following % 3 == 0, -100))


def cut(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


@pytest.mark.parametrize(
    ("write", "damage", "words"),
    [
        ("megatron", lambda f: (f / "all.idx").unlink(), r"all.idx is not there, and tells where documents"),
        ("megatron", lambda f: cut(f / "all.idx", 8), r"all.idx has \d+ bytes, and \d+ by its header"),
        ("megatron", lambda f: cut(f / "all.bin", 2), r"all.bin has \d+ bytes, and \d+ by its index"),
        ("megatron", lambda f: (f / "all.idx").write_bytes(b"x" * 99), r"all.idx is no index of Megatron's"),
        ("datatrove", lambda f: (f / "all.ds.index").unlink(), r"all.ds.index is not there"),
        ("datatrove", lambda f: cut(f / "all.ds", 2), r"all.ds has \d+ bytes for \d+ tokens by its index"),
        ("datatrove", lambda f: cut(f / "all.ds.index", 3), r"all.ds.index has 317 bytes, 8 for each document"),
        ("datatrove", lambda f: write_datatrove(f / "b.ds", [[1]], "<u4"), r"tokens of several types"),
    ],
    ids=["no index", "index", "tokens", "another file", "no ends", "tokens of datatrove", "ends cut", "types"],
)
def test_damage_is_named(tmp_path: Path, write: str, damage: Any, words: str) -> None:
    written = WRITERS[write](tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError) as caught:
        open_foreign(foreign_files(tmp_path) or [written])
    assert re.search(words, str(caught.value))


@pytest.mark.parametrize("packing", ["cut", "fit"])
@pytest.mark.parametrize(
    ("kind", "file", "at", "content"),
    [
        ("datatrove", "all.ds.index", 8 * 37, b"\xff" * 8),
        ("datatrove", "all.ds.index", 8 * 37, bytes(8)),
        ("megatron", "all.idx", 34 + 4 * 80 + 8 * 76, b"\xff" * 8),
        ("megatron", "all.idx", 34 + 12 * 80 + 8 * 38, b"\xff" + bytes(7)),
    ],
    ids=["beyond", "before", "an offset", "a sequence"],
)
def test_an_index_that_is_damaged_in_the_middle(
    tmp_path: Path, kind: str, file: str, at: int, content: bytes, packing: str
) -> None:
    WRITERS[kind](tmp_path)
    with (tmp_path / file).open("r+b") as opened:
        opened.seek(at)
        opened.write(content)
    with pytest.raises(UserError, match=f"{file} is damaged: documents of all.* end before they begin, or beyond it"):
        module_of(tmp_path, packing=packing).setup()


def test_metadata_that_is_no_text(tmp_path: Path) -> None:
    WRITERS["datatrove"](tmp_path)
    (tmp_path / "all.ds.metadata").write_bytes(b"m\xfc\xdfig|2\n")
    assert len(open_foreign(foreign_files(tmp_path))) == len(STREAM)


def test_options_that_they_do_not_have(tmp_path: Path) -> None:
    WRITERS["datatrove"](tmp_path)
    for options in ({"tokenizer": None}, {"streaming": True}, {"validation_split": "x"}):
        with pytest.raises(UserError, match="holds tokens that others have made; legal: the tokenizer"):
            module_of(tmp_path, **options)
