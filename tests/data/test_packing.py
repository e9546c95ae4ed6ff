import numpy as np
import pytest
import torch
from helpers.cases import case
from hypothesis import given
from hypothesis import strategies as st

from lightning_tex.data.packing import IGNORE_INDEX, Packer, stream_fingerprint
from lightning_tex.data.tokenizer import END_OF_DOCUMENT, TextTokenizer, train_bpe
from lightning_tex.data.tokens.store import list_shards, open_shards, shard_path, token_dtype, write_shard

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


def stored(folder, pieces):
    """Pieces as shards of a document each."""
    for number, piece in enumerate(pieces):
        tokens = np.array(piece, token_dtype(1000))
        write_shard(shard_path(folder, number), tokens, np.array([len(tokens)]), None, {})
    list_shards(folder, len(pieces))
    return open_shards(folder, "")


def test_fingerprint_depends_on_the_stream_alone(tmp_path):
    streams = [[[1, 2, 3], [], [4, 500]], [[1, 2], [3, 4, 500]], [[1, 2, 3, 4, 500, 1]]]
    folders = [tmp_path / str(i) for i in range(3)]
    for folder in folders:
        folder.mkdir()
    whole, parts, more = (stored(folder, stream) for folder, stream in zip(folders, streams, strict=True))
    assert stream_fingerprint(whole, 4) == stream_fingerprint(parts, 4)
    assert len({stream_fingerprint(whole, 4), stream_fingerprint(whole, 5), stream_fingerprint(more, 4)}) == 3


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


@pytest.mark.parametrize("document_mask", [False, True])
def test_unigram_loss_against_a_plain_loop(make, document_mask):
    data = make(document_mask=document_mask)
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


def by_hand(stream, end, block):
    """Segments and labels of a block of 32 inputs of a stream, by a loop."""
    segments, labels, document = [], [], 0
    for position in range(block * 32, block * 32 + 32):
        segments.append(document)
        token = stream[position] if position < len(stream) else None
        following = stream[position + 1] if position + 1 < len(stream) else IGNORE_INDEX
        labels.append(IGNORE_INDEX if token == end else following)
        document += token == end
    return segments, labels


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_are_numbered_and_predict_nothing_of_each_other(make, streaming):
    data = make(document_mask=True, streaming=streaming)
    data.setup()
    end = data.end_of_document_id
    documents = data._preparation.source.load(data._cache_dirs()[0] / "sources").validation
    texts = [row["text"] for row in documents]
    stream = [t for text in texts for t in [*data.encode(text), end]]
    rows = [row for batch in data.val_dataloader() for row in zip(*(batch[n] for n in batch), strict=True)]
    names = ["input_ids", "labels", "sample", "segments"]
    whole = [dict(zip(names, row, strict=True)) for row in rows if row[2] >= 0]
    assert len(whole) == -(-(len(stream) - 1) // 32) and len(texts) > 1
    for block, row in enumerate(whole):
        segments, labels = by_hand(stream, end, block)
        assert row["segments"].tolist() == segments
        assert row["labels"].tolist() == labels
    empty = [row for row in rows if row[2] < 0]  # rows of padding
    assert all(int(row[3].max()) == 0 and int(row[1].max()) == IGNORE_INDEX for row in empty)


def test_document_masks_change_no_block_and_no_order(make):
    plain, masked = make(), make(document_mask=True)
    for loader in ("train_dataloader", "val_dataloader"):
        for one, other in zip(getattr(plain, loader)(), getattr(masked, loader)(), strict=True):
            assert list(one) == ["input_ids", "labels", "sample"]
            assert all(torch.equal(one[name], other[name]) for name in ("input_ids", "sample"))
            left_out = one["labels"] != other["labels"]
            assert torch.equal(left_out, (one["input_ids"] == masked.end_of_document_id) & (one["labels"] >= 0))
    assert masked.state_dict() == plain.state_dict()
    assert masked.alike_on_all_ranks() == {**plain.alike_on_all_ranks(), "document_mask": True}


def test_segments_with_workers(make):
    alone, worked = (list(make(document_mask=True, num_workers=n).train_dataloader()) for n in (0, 2))
    assert all(torch.equal(a["segments"], b["segments"]) for a, b in zip(alone, worked, strict=True))
