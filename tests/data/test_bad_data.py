"""Data that cannot be what was meant: an error that names the file, the row where it is known, and the remedy."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bad_data import TEXT, data_of, overwrite, read, refused
from helpers.behaviour_modules import PublicNames, new_trainer
from helpers.ranks import on_ranks
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_tex.data.packing import Blocks
from lightning_tex.data.prepared import Prepared
from lightning_tex.errors import UserError
from lightning_tex.testing.ranks import RanksFailed

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    place = tmp_path / "corpus"
    place.mkdir()
    return place


def texts(corpus: Path, *contents: str | bytes) -> None:
    for i, content in enumerate(contents):
        (corpus / f"{i}.txt").write_bytes(content.encode() if isinstance(content, str) else content)


def json_lines(corpus: Path, *lines: str) -> None:
    good = json.dumps({"text": TEXT * 9})
    (corpus / "a.jsonl").write_text("\n".join([good] * 6 + list(lines)) + "\n")


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ([], "the folder path='.*corpus' is empty; legal: a folder with .*, .txt files"),
        ([""], "0 documents in path='.*corpus' leave nothing to hold out"),
        (["", ""], "the training documents of path='.*' are shorter than one block of sequence_length [+] 1 = 17"),
        (["a", "b"], "the training documents of path='.*' are shorter than one block of sequence_length [+] 1 = 17"),
    ],
    ids=["no file", "an empty file", "empty files", "one token"],
)
def test_too_little_text(corpus: Path, contents: list[str], words: str) -> None:
    texts(corpus, *contents)
    assert re.search(words, refused(lambda: data_of(corpus)))


def test_too_little_text_in_a_stream(corpus: Path) -> None:
    texts(corpus, "", "a", TEXT * 4)
    words = "global_batch_size=2 is more than the [01] training blocks of sequence_length=16 that the stream has"
    assert re.search(words, refused(lambda: data_of(corpus, streaming=True, validation_fraction=0.5)))


def test_documents_of_one_token_and_of_none_are_legal_among_others(corpus: Path) -> None:
    texts(corpus, TEXT * 20, "a", "", TEXT * 20)
    read(data_of(corpus))


@pytest.mark.parametrize("streaming", [False, True])
def test_not_utf_8(corpus: Path, streaming: bool) -> None:
    texts(corpus, TEXT * 20, b"first\nm\xfc\xdfig\n", TEXT * 20)
    text = refused(lambda: data_of(corpus, streaming=streaming))
    assert f"{corpus}/1.txt is not UTF-8: byte 0xfc at offset 7, line 2; convert it" in text


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "cut', r"a\.jsonl is no JSON in line 7: .* one object a line"),
        ('{"text": null}', r"a\.jsonl, line 7: 'text' is None and no text; legal: strings in every row"),
    ],
    ids=["cut short", "null"],
)
def test_json_lines(corpus: Path, line: str, words: str, streaming: bool) -> None:
    json_lines(corpus, line)
    assert re.search(words, refused(lambda: data_of(corpus, streaming=streaming)))


def test_lines_of_several_schemas(corpus: Path) -> None:
    json_lines(corpus)
    (corpus / "b.jsonl").write_text('{"body": "other"}\n')
    words = f"{corpus}/b.jsonl has the columns body (str), and {corpus}/a.jsonl has text (str); legal"
    assert words in refused(lambda: data_of(corpus))


def test_files_that_are_not_there(corpus: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot read path='.*nowhere', split='train'"):
        read(data_of(corpus / "nowhere"))


# --- tokenizers


def test_a_tokenizer_that_is_none(corpus: Path) -> None:
    texts(corpus, TEXT * 20, TEXT * 20)
    file = corpus.parent / "tokenizer.json"
    file.write_text('{"version": ')
    text = refused(lambda: data_of(corpus, tokenizer=str(file), vocab_size=None))
    assert f"{file} is no tokenizers JSON file" in text


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (models.WordLevel({"other": 0, "</s>": 1}, unk_token="[UNK]"), "the tokenizer has no tokens for this text"),
        (models.BPE({"x": 0, "</s>": 1}, []), "shorter than one block"),
    ],
    ids=["raises", "gives nothing"],
)
def test_a_tokenizer_that_does_not_know_the_text(corpus: Path, model: Any, words: str) -> None:
    texts(corpus, TEXT * 20, TEXT * 20)
    file = corpus.parent / "tokenizer.json"
    Tokenizer(model).save(str(file))
    assert words in refused(lambda: data_of(corpus, tokenizer=str(file), vocab_size=None))


# --- prepared data


@pytest.fixture
def prepared(corpus: Path) -> Prepared:
    texts(corpus, TEXT * 20, TEXT * 20, TEXT * 20)
    return data_of(corpus).prepared


def file_of(samples: Any) -> Path:
    assert isinstance(samples, Blocks)
    return samples.stream.files[0].path


def test_prepared_data_cut_short(corpus: Path, prepared: Prepared) -> None:
    file = file_of(prepared.train)
    whole = file.stat().st_size
    os.truncate(file, whole - 8)
    text = refused(lambda: data_of(corpus))
    assert f"{file} has {whole - 8} bytes and was written with {whole}; delete the folder {file.parents[1]}" in text


def test_prepared_data_whose_list_is_damaged(corpus: Path, prepared: Prepared) -> None:
    file = file_of(prepared.train).with_name("shards.json")
    overwrite(file, 0, b"\0" * 8)
    assert f"{file} is gone or damaged; delete the folder {file.parents[1]}" in refused(lambda: data_of(corpus))


@pytest.mark.parametrize("name", ["00000.tokens", "shards.json"])
def test_prepared_data_that_is_gone(corpus: Path, prepared: Prepared, name: str) -> None:
    file = file_of(prepared.validation).with_name(name)
    file.unlink()
    text = refused(lambda: data_of(corpus))
    assert re.search(f"{file} is gone.*; delete the folder {file.parents[1]}", text)
    shutil.rmtree(file.parents[1])
    read(data_of(corpus))  # as the message promises


def test_a_note_cut_short_is_written_again(corpus: Path, prepared: Prepared) -> None:
    (note,) = (corpus.parent / "cache" / "notes").iterdir()
    note.write_text(note.read_text()[:10])
    read(data_of(corpus))
    assert json.loads(note.read_text())


@pytest.mark.parametrize("workers", [0, 1])
def test_prepared_ids_beyond_the_vocabulary(corpus: Path, prepared: Prepared, workers: int) -> None:
    file = file_of(prepared.validation)
    overwrite(file, 6, b"\xff\xff")
    text = refused(lambda: data_of(corpus, num_workers=workers))
    size = prepared.tokenizer.size
    assert f"{file} has 65535 as token 3 of its stream, and the tokenizer has {size} tokens" in text


# --- workers


class Fatal(Dataset):
    """Sample 5 ends the process that reads it, or cannot be read."""

    def __init__(self, way: str) -> None:
        self.way = way

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> list[Tensor]:
        if index == 5 and self.way == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 5 and self.way == "raises":
            raise KeyError("sample 5 has no text")
        return [torch.full((1, 5), index), torch.full((1, 5), index)]


def fit_with_worker(ways: list[str]) -> None:
    trainer = new_trainer({})
    way = ways[trainer.global_rank]
    trainer.fit(PublicNames(), DataLoader(Fatal(way), batch_size=None, num_workers=1))


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("dies", r"UserRuntimeError: rank 1: DataLoader worker \(pid.*/dev/shm has \d+ MiB free; .*num_workers=0"),
        ("raises", r"UserRuntimeError: rank 1: a DataLoader worker raised KeyError: 'sample 5 has no text'"),
    ],
)
def test_a_worker_of_one_rank_that_ends(way: str, words: str) -> None:
    """The other rank hears of it by the collective that it waits in."""
    with pytest.raises(RanksFailed) as caught:
        on_ranks(2, fit_with_worker, ["reads", way])
    assert not caught.value.hung
    assert re.search(words, str(caught.value).split("--- rank 1")[1])


def fit_damaged(corpus: Path) -> str:
    data = data_of(corpus, num_workers=1, global_batch_size=4)
    trainer = new_trainer({}, limit_val_batches=0)
    with pytest.raises(UserError) as caught:
        trainer.fit(Tokens(), datamodule=data)
    return str(caught.value)


class Tokens(PublicNames):
    """Trains on a text data module's batches, whatever the tokens."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.loss([batch["input_ids"] % 61, batch["input_ids"] % 61])


def test_what_a_worker_refuses_is_one_line_on_every_rank(corpus: Path, prepared: Prepared) -> None:
    file = file_of(prepared.train)
    overwrite(file, 0, b"\xff" * file.stat().st_size)
    for rank, text in enumerate(on_ranks(2, fit_damaged, corpus)):
        assert re.fullmatch(rf"rank {rank}: {file} has 65535 as token \d+ of its stream, .*", text)
