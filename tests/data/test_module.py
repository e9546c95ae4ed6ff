import functools
import hashlib
import json
import multiprocessing
import os

import jsonargparse
import pytest
import torch
from helpers.cases import case

from lightning_tex.data import TextDataModule
from lightning_tex.data.packing import IGNORE_INDEX
from lightning_tex.data.prepared import default_cache_dir

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*use of fork.. may lead to deadlocks:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]


def in_processes(count, work):
    """Runs ``work(rank)`` in forked processes at the same time."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(count)

    def start(rank):
        barrier.wait()
        work(rank)

    processes = [context.Process(target=start, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * count


def samples(loader):
    return [batch["sample"].tolist() for batch in loader]


def test_two_processes_prepare_at_the_same_time(make, tmp_path):
    def prepare(rank):
        data = make(cache_dir=str(tmp_path / "cache"))
        data.prepare_data()
        data.setup()
        (tmp_path / f"{rank}.json").write_text(
            json.dumps([data.prepared.fingerprint, samples(data.train_dataloader())])
        )

    in_processes(3, prepare)
    first, *others = [(tmp_path / f"{rank}.json").read_text() for rank in range(3)]
    assert others == [first] * 2
    for kind in ("tokens", "tokenizers"):
        assert len(list((tmp_path / "cache" / kind).iterdir())) == 1  # one result, and no drafts left over


def digest(loader):
    """Of all that a loader gives."""
    batches = [batch[name].numpy().tobytes() for batch in loader for name in sorted(batch)]
    return hashlib.blake2b(b"".join(batches), digest_size=8).hexdigest()


def test_what_was_served_once_is_served_for_ever(tmp_path):
    """Checkpoints of earlier versions go on with what they would have read."""
    file = tmp_path / "corpus.jsonl"
    file.write_text(
        "".join(json.dumps({"text": f"Document {i} says {i * i} " * (i % 7 + 1)}) + "\n" for i in range(60))
    )
    data = TextDataModule(str(file), vocab_size=300, sequence_length=32, cache_dir=str(tmp_path / "cache"))
    assert data.prepared.fingerprint == "a4e73a70f44fc489bba19bd38dff69d7"
    assert (digest(data.train_dataloader()), digest(data.val_dataloader())) == ("a4a5b3fade3706fa", "d98846ae07ba9496")


def test_preparing_once_is_enough(make, monkeypatch, tmp_path):
    make(cache_dir=str(tmp_path)).prepare_data()
    monkeypatch.setattr("lightning_tex.data.corpus.Source.load", lambda *_: pytest.fail("read the documents again"))
    data = make(cache_dir=str(tmp_path))
    data.setup()
    assert len(data.prepared.train) > 0


def test_changed_files_are_noticed(make, folder, tmp_path):
    copy = tmp_path / "corpus"
    copy.mkdir()
    for file in folder.rglob("*.*"):
        (copy / file.name).write_text(file.read_text())
    prints = []
    for _ in range(2):
        data = make(path=str(copy), cache_dir=str(tmp_path / "cache"))
        data.prepare_data()
        data.setup()
        prints.append(data.prepared.fingerprint)
        (copy / "000.txt").write_text("another text")
    assert prints[0] != prints[1]


def test_default_corpus_end_to_end(tmp_path):
    data = TextDataModule(max_bytes=200_000, vocab_size=500, sequence_length=64, cache_dir=str(tmp_path))
    assert data.vocab_size == 500
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == batch["labels"].shape == (8, 64)
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
    assert 3 < data.unigram_loss() < torch.tensor(500.0).log()


def test_cache_directory(monkeypatch):
    assert str(default_cache_dir()) == os.environ["LIGHTNING_TEX_CACHE"]
    monkeypatch.delenv("LIGHTNING_TEX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(default_cache_dir()) == "/somewhere/lightning_tex"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir().parts[-2:] == (".cache", "lightning_tex")


def test_constructor_is_the_configuration():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TextDataModule, "data")
    config = parser.parse_args(
        ["--data.path=json", '--data.data_files={"train": ["a.jsonl"]}', "--data.streaming=true"]
    )
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    assert instantiate(config).data.streaming


def test_validation_reads_every_block_once_on_every_layout(make):
    alone = [i for step in samples(make(global_batch_size=4).val_dataloader()) for i in step]
    for ranks in (1, 2, 4):
        with case(ranks=ranks):
            shares = []
            for rank in range(ranks):
                data = make(global_batch_size=4)
                data._share = functools.partial(pretend_share, data.global_batch_size, ranks, rank)
                shares.append(list(data.val_dataloader()))
            assert len({len(share) for share in shares}) == 1
            steps = [torch.cat([b["sample"] for b in step]).tolist() for step in zip(*shares, strict=True)]
            assert [i for step in steps for i in step] == alone
            padding = [b["labels"][b["sample"] < 0] for share in shares for b in share]
            assert all((labels == IGNORE_INDEX).all() for labels in padding)


def pretend_share(size, ranks, rank):
    from lightning_tex.data.order import Share

    return Share(size, ranks, rank)


def test_refusals(make):
    with pytest.raises(
        ValueError, match="global_batch_size=5000 is more than the 98 training blocks of sequence_length=32"
    ):
        make(global_batch_size=5000).train_dataloader()
    with pytest.raises(ValueError, match="global_batch_size=0"):
        make(global_batch_size=0)
    with pytest.raises(ValueError, match="sequence_length=0"):
        make(sequence_length=0)
    with pytest.raises(ValueError, match="shuffle_buffer=5 needs streaming=True"):
        make(shuffle_buffer=5)


@pytest.fixture
def stream(make, jsonl):
    options = {"path": "json", "data_files": str(jsonl), "text_column": "body", "streaming": True}
    return lambda **more: make(**(options | {"sequence_length": 72} | more))


def test_a_tokenizer_of_the_hub(stream, jsonl, monkeypatch, tmp_path):
    """From where the hub's client keeps what it has downloaded, with the hub out of reach."""
    trained = TextDataModule(path=str(jsonl), text_column="body", vocab_size=300)
    repository = tmp_path / "models--someone--bpe"
    (repository / "snapshots" / "1").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1")
    trained.prepared.tokenizer.tokenizer.save(str(repository / "snapshots" / "1" / "tokenizer.json"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    assert stream(tokenizer="someone/bpe", vocab_size=None).vocab_size == trained.prepared.tokenizer.size
    padded = stream(tokenizer="someone/bpe", vocab_size=512)
    assert padded.vocab_size == 512
    batch = next(iter(padded.train_dataloader()))
    assert batch["input_ids"].max() < trained.prepared.tokenizer.size

    unread = stream(tokenizer="someone/else", vocab_size=512)  # not looked for before it is needed
    assert unread.vocab_size == 512
    with pytest.raises(FileNotFoundError, match="tokenizer='someone/else' is no file or folder here, and the Hugging"):
        unread.setup()
    with pytest.raises(ValueError, match="vocab_size=260 is too small; legal are 300 and more"):
        stream(tokenizer="someone/bpe", vocab_size=260).setup()


def test_a_stream_gives_the_blocks_of_the_file(stream):
    whole = stream(streaming=False)
    blocks = whole.prepared.train[list(range(40))]
    streamed = list(stream(tokenizer=str(tokenizer_dir(whole)), vocab_size=None).train_dataloader())
    assert torch.equal(torch.cat([b["input_ids"] for b in streamed]), blocks["input_ids"])
    assert torch.equal(torch.cat([b["labels"] for b in streamed]), blocks["labels"])
    held_out = list(stream(tokenizer=str(tokenizer_dir(whole)), vocab_size=None).val_dataloader())
    expected = list(whole.val_dataloader())
    assert [b["labels"].tolist() for b in held_out] == [b["labels"].tolist() for b in expected]
    assert stream().unigram_loss() is None


def tokenizer_dir(data):
    return next(p for p in (default_cache_dir() / "tokenizers").iterdir() if is_of(p, data))


def is_of(path, data):
    return json.loads((path / "tokenizer.json").read_text()) == json.loads(data.prepared.tokenizer.tokenizer.to_str())


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"shuffle_buffer": 20}], ids=str)
def test_a_stream_resumes(stream, trainer, recorder, tmp_path, options):
    whole, run = recorder(), trainer(max_epochs=2, limit_val_batches=0)
    run.fit(whole, datamodule=stream(**options))
    assert [i for step in whole.seen for i in step] == list(range(40)) * 2
    for done in (2, 5, 7):
        with case(done=done):
            first, rest = recorder(), recorder()
            short = trainer(max_steps=done, limit_val_batches=0)
            short.fit(first, datamodule=stream(**options))
            short.save_checkpoint(tmp_path / "stopped.ckpt")
            longer = trainer(max_steps=10, limit_val_batches=0)
            longer.fit(rest, datamodule=stream(**options), ckpt_path=str(tmp_path / "stopped.ckpt"))
            assert first.seen + rest.seen == whole.seen


def test_two_ranks_under_lightning(make, trainer, recorder, tmp_path):
    """Fit, resume, validate and predict in a world of two read what one process reads, with no sampler put on top."""
    run, whole = trainer(max_steps=3), recorder()
    run.fit(recorder(), datamodule=make())
    trainer(max_epochs=1).fit(whole, datamodule=make())
    run.save_checkpoint(tmp_path / "stopped.ckpt")
    port = 20000 + os.getpid() % 20000

    def work(rank):
        os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2")
        os.environ.update(NODE_RANK="0")
        module = recorder()
        world = trainer(devices=2, strategy="ddp", max_steps=12)
        world.fit(module, datamodule=make(), ckpt_path=str(tmp_path / "stopped.ckpt"))
        predicted = world.predict(module, datamodule=make())
        (tmp_path / f"{rank}.json").write_text(json.dumps([module.seen, module.validated, predicted]))

    in_processes(2, work)
    parts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    seen, validated, predicted = ([a + b for a, b in zip(*part, strict=True)] for part in zip(*parts, strict=True))
    assert len(whole.seen) == 12
    assert seen == whole.seen[3:]
    assert validated == predicted == samples(make().val_dataloader())
