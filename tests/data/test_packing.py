import numpy as np
import pytest
import torch
from helpers.cases import case
from hypothesis import given
from hypothesis import strategies as st

from lightning_tex.data.packing import IGNORE_INDEX, Packer
from lightning_tex.data.tokenizer import END_OF_DOCUMENT, TextTokenizer, train_bpe

pieces = st.lists(st.lists(st.integers(0, 999), max_size=30), max_size=10)


@given(pieces=pieces, length=st.integers(1, 12))
def test_packing_against_a_plain_loop(pieces, length):
    packer = Packer(length)
    blocks = [block.tolist() for piece in pieces for block in packer.push(piece)] + [b.tolist() for b in packer.flush()]
    stream = [token for piece in pieces for token in piece]
    expected = []
    for start in range(0, len(stream) - 1, length):
        block = stream[start : start + length + 1]
        expected.append(block + [IGNORE_INDEX] * (length + 1 - len(block)))
    assert blocks == expected


@given(pieces=pieces, length=st.integers(1, 12))
def test_fingerprint_depends_on_the_stream_alone(pieces, length):
    whole, parts = Packer(length), Packer(length)
    whole.push([token for piece in pieces for token in piece])
    for piece in pieces:
        parts.push(piece)
    assert whole.fingerprint() == parts.fingerprint()
    assert Packer(length + 1).fingerprint() != Packer(length).fingerprint()
    parts.push([1])
    assert whole.fingerprint() != parts.fingerprint()


def test_batches_hold_the_stream(make):
    data = make()
    data.setup()
    tokenizer, end = data.prepared.tokenizer, data.end_of_document_id
    documents = data._preparation.source.load(data._cache_dirs()[0] / "sources")
    stream = [t for text in documents.validation["text"] for t in [*tokenizer.encode(text), end]]
    batches = list(data.val_dataloader())
    inputs = torch.cat([b["input_ids"] for b in batches])
    labels = torch.cat([b["labels"] for b in batches])
    assert inputs.shape[1] == 32
    assert inputs.dtype == labels.dtype == torch.int64
    assert inputs.flatten()[: len(stream)].tolist()[:-1] == stream[:-1]
    assert labels[labels != IGNORE_INDEX].tolist() == stream[1:]
    assert torch.equal(labels[0, :-1], inputs[0, 1:])
    assert data.decode(stream).split(END_OF_DOCUMENT)[:-1] == documents.validation["text"]


def test_training_blocks_are_the_training_stream(make):
    data = make()
    data.setup()
    documents = data._preparation.source.load(data._cache_dirs()[0] / "sources").train["text"]
    stream = [t for text in documents for t in [*data.encode(text), data.end_of_document_id]]
    blocks = np.concatenate(list(data.prepared.train.tokens(batch_size=7)))
    assert blocks[:, :-1].ravel().tolist() == stream[: len(blocks) * 32]
    assert len(blocks) == (len(stream) - 1) // 32


def test_unigram_loss_against_a_plain_loop(make):
    data = make()
    train = np.concatenate(list(data.prepared.train.tokens()))[:, :-1].ravel().tolist()
    labels = [t for batch in data.val_dataloader() for t in batch["labels"].flatten().tolist() if t != IGNORE_INDEX]
    nats = [-np.log((train.count(t) + 1) / (len(train) + data.vocab_size)) for t in labels]
    assert data.unigram_loss() == pytest.approx(np.mean(nats), rel=1e-12)


def test_bpe_is_deterministic_and_lossless(documents):
    first, second = (train_bpe(documents, 400).to_str() for _ in range(2))
    assert first == second
    tokenizer = TextTokenizer(train_bpe(documents, 400))
    for text in ["Document 3\n tensor", "ünïcödé \U0001f600 \x00", f"spelled {END_OF_DOCUMENT} out"]:
        with case(text):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert tokenizer.end_of_document_id not in ids
            assert max(ids) < tokenizer.size <= 400
    assert tokenizer.encode_documents(documents) == [
        [*tokenizer.encode(text), tokenizer.end_of_document_id] for text in documents
    ]


def test_tokenizer_file_and_folder(make, documents, tmp_path):
    train_bpe(documents, 350).save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with case(path):
            data = make(tokenizer=str(path), vocab_size=None)
            size = data.vocab_size  # before any data is read
            assert 257 <= size <= 350
            top = max(int(batch["input_ids"].max()) for batch in data.train_dataloader())
            assert top < size
    assert make(tokenizer=str(tmp_path), vocab_size=512).vocab_size == 512


def test_tokenizer_refusals(make, documents, tmp_path):
    with pytest.raises(ValueError, match="vocab_size=100 is too small; legal are 257 and more"):
        make(vocab_size=100)
    with pytest.raises(FileNotFoundError, match="neither a tokenizers JSON file nor a folder"):
        make(tokenizer=str(tmp_path / "nowhere"))
    train_bpe(documents, 350).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"no end-of-document token <stop>; .* special tokens: <\|endoftext\|>"):
        make(tokenizer=str(tmp_path), end_of_document="<stop>", vocab_size=None)
