"""Fine-tuning data: what is learnt, what lies where, bad data by name, and the same samples on every layout."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from helpers.cases import case
from helpers.chats import TEMPLATES, chat, sums, write_lines, write_tokenizer
from helpers.trainers import quiet
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from tokenizers import Tokenizer
from torch import Tensor

from lightning_tex import FineTuningDataModule
from lightning_tex.data.chat.preparation import summary
from lightning_tex.data.order import Share
from lightning_tex.errors import UserError
from lightning_tex.models.language_model import predicts_nothing

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*use of fork.. may lead to deadlocks:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make(tmp_path: Path, tokenizer: Path) -> Callable[..., FineTuningDataModule]:
    def made(rows: Any = None, **options: Any) -> FineTuningDataModule:
        file = tmp_path / "rows.jsonl"
        if not file.exists():
            write_lines(file, sums(40) if rows is None else rows)
        usual = {"path": str(file), "tokenizer": str(tokenizer), "sequence_length": 96, "global_batch_size": 4}
        return FineTuningDataModule(**{**usual, "cache_dir": str(tmp_path / "cache"), "num_proc": 1, **options})

    return made


def learnt(data: FineTuningDataModule, batch: dict[str, Tensor]) -> list[str]:
    """What is learnt in each row of a batch, one stretch behind the other with | between."""
    rows = []
    for labels in batch["labels"].tolist():
        stretches = [[]]
        for label in labels:
            if label >= 0:
                stretches[-1].append(label)
            elif stretches[-1]:
                stretches.append([])
        rows.append("|".join(data.decode(stretch) for stretch in stretches if stretch))
    return rows


def whole(data: FineTuningDataModule, part: str = "train") -> dict[str, Tensor]:
    samples = getattr(data.prepared, part)
    return samples[list(range(len(samples)))]


# --- what is learnt


def test_of_messages_the_answers_are_learnt_and_of_what_else_nothing(make: Any) -> None:
    data = make([{"messages": chat("one?", "first", "two?", "second")}, {"messages": chat("x", "y")}], packing=False)
    assert learnt(data, whole(data)) + learnt(data, whole(data, "validation")) == [
        "first<|im_end|>|second<|im_end|>",
        "y<|im_end|>",
    ]
    inputs = data.decode(whole(data)["input_ids"][0][whole(data)["attention_mask"][0].bool()])
    assert inputs.startswith("<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>\n")


def test_everything_is_learnt_where_that_is_asked_for(make: Any) -> None:
    data = make([{"messages": chat("one?", "first")}] * 2, packing=False, loss="all")
    assert learnt(data, whole(data)) == ["user\none?<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>\n"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "one plus", "completion": " one"}, " one<|im_end|>"),
        ({"text": "all of it"}, "all of it<|im_end|>"),
        ({"prompt": chat("one?"), "completion": chat("", "first")[1:]}, "first<|im_end|>"),
        ({"prompt": chat("a", "b", "c"), "completion": [{"role": "assistant", "content": "d"}]}, "d<|im_end|>"),
        ({"messages": [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "first"}]}, "first<|im_end|>"),
        ({"prompt": "beside", "messages": chat("one?", "first"), "text": None}, "first<|im_end|>"),
    ],
    ids=["prompt", "text", "prompt of messages", "earlier answers", "from and value", "several"],
)
def test_columns_are_told_by_the_first_row(make: Any, row: dict[str, Any], expected: str) -> None:
    data = make([row] * 2, packing=False)
    got = learnt(data, whole(data))[0]
    assert got == expected or (row.get("text") and expected.endswith(got))  # the first token of all is never learnt


def test_columns_by_names_of_ones_own(make: Any) -> None:
    data = make([{"chat": chat("one?", "first")}] * 2, packing=False, columns={"messages": "chat"})
    assert learnt(data, whole(data)) == ["first<|im_end|>"]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_templates_of_a_tokenizer_in_either_file(make: Any, tmp_path: Path, kind: str) -> None:
    rows = [{"messages": chat("one?", "first")}] * 2
    folder = write_tokenizer(tmp_path / "own", TEMPLATES[kind])
    data = make(rows, tokenizer=str(folder), packing=False)
    assert "first" in learnt(data, whole(data))[0] and "one?" not in learnt(data, whole(data))[0]
    other = write_tokenizer(tmp_path / "other", None)
    (other / "chat_template.jinja").write_text(TEMPLATES[kind])
    assert torch.equal(whole(make(tokenizer=str(other), packing=False))["labels"], whole(data)["labels"])


def test_without_a_tokenizer_one_is_trained(make: Any) -> None:
    data = make(tokenizer=None, vocab_size=300)
    assert {token.content for token in data.prepared.tokenizer.tokenizer.get_added_tokens_decoder().values()} == {
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    }
    assert all(text.endswith("<|im_end|>") for text in learnt(data, whole(data)))


# --- rows


@pytest.mark.parametrize("loss", ["answers", "all"])
def test_packed_rows_hold_each_conversation_once(make: Any, loss: str) -> None:
    packed, padded = make(loss=loss), make(loss=loss, packing=False)
    assert len(packed.prepared.train) < len(padded.prepared.train)
    alone = whole(padded)
    expected = sorted(
        (ids[mask.bool()].tolist(), labels[mask.bool()].tolist())
        for ids, labels, mask in zip(alone["input_ids"], alone["labels"], alone["attention_mask"], strict=True)
    )
    found = []
    for ids, labels, mask, segments in zip(*(whole(packed)[n] for n in NAMES), strict=True):
        for segment in range(int(segments.max()) + 1):
            mine = (segments == segment) & mask.bool()
            found.append((ids[mine].tolist(), labels[mine].tolist()))
        assert (segments.diff() >= 0).all() and (mask.diff() <= 0).all() and (labels[mask == 0] == -100).all()
    assert sorted(found) == expected


NAMES = ("input_ids", "labels", "attention_mask", "segments")


def test_padding_by_bucket(make: Any) -> None:
    data = make(packing=False, buckets=[24, 48, 96], global_batch_size=4)
    batches = list(data.train_dataloader())
    widths = [batch["input_ids"].shape[1] for batch in batches]
    assert set(widths) <= {24, 48, 96} and len(set(widths)) > 1
    for batch, width in zip(batches, widths, strict=True):
        longest = int(batch["attention_mask"].sum(1).max())
        assert width == min(bucket for bucket in (24, 48, 96) if bucket >= longest)
    seen = [sample for batch in batches for sample in batch["sample"].tolist()]
    assert len(seen) == len(set(seen)) == len(data.prepared.train) // 4 * 4
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    one_length = 96 * len(seen)
    grouped = sum(batch["input_ids"].numel() for batch in batches)
    assert tokens <= grouped < one_length


@pytest.mark.parametrize(("too_long", "kept"), [("cut", 3), ("leave_out", 2)])
def test_conversations_that_are_too_long_are_counted(make: Any, too_long: str, kept: int) -> None:
    rows = [{"messages": chat("one?", text)} for text in ("a", "b" * 150, "c", "d")]
    rows += [{"messages": chat("e" * 150, "never seen")}, {"messages": chat("no answer")}]
    data = make(rows, too_long=too_long, packing=False, validation_fraction=0.2)
    counts = summary(data.prepared.folder / "train")["counts"]
    assert counts[f"too long, {'cut' if too_long == 'cut' else 'left out'}"] == 2
    assert counts["nothing to learn, left out"] == (2 if too_long == "cut" else 1)
    assert len(data.prepared.train) == counts["conversations"] == kept
    assert whole(data)["attention_mask"].sum(1).max() == (96 if too_long == "cut" else 23)


def test_special_tokens_that_are_spelled_out_are_counted(make: Any) -> None:
    rows = [{"messages": chat("one?", text)} for text in ("a", "b <|im_end|> c", "d", "e")]
    assert re.search(
        r"3 of 3 conversations \(1 with a special token spelled out, kept\)", make(rows).prepared.describe()[0]
    )


# --- the same on every layout, with workers, and resumed


@pytest.mark.parametrize("packing", [True, False])
def test_samples_are_the_same_on_data_axes_and_with_workers(make: Any, packing: bool) -> None:
    alone = [batch["sample"].tolist() for batch in make(packing=packing).train_dataloader()]
    assert len(alone) > 2
    for ranks, workers in ((1, 2), (2, 0), (4, 0)):
        with case(ranks=ranks, workers=workers):
            shares = []
            for rank in range(ranks):
                data = make(packing=packing, num_workers=workers)
                data._share = functools.partial(Share, data.global_batch_size, ranks, rank)
                shares.append([batch["sample"].tolist() for batch in data.train_dataloader()])
            assert [list(chain(*parts)) for parts in zip(*shares, strict=True)] == alone


@pytest.mark.parametrize("packing", [True, False])
def test_a_run_resumes_within_an_epoch(make: Any, recorder: Any, tmp_path: Path, packing: bool) -> None:
    flags = {"devices": 1, "limit_val_batches": 0, "default_root_dir": tmp_path}
    undisturbed, first, rest = recorder(), recorder(), recorder()
    quiet(max_steps=12, **flags).fit(undisturbed, datamodule=make(packing=packing))
    stopped = quiet(max_steps=5, **flags)
    stopped.fit(first, datamodule=make(packing=packing))
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    quiet(max_steps=12, **flags).fit(
        rest, datamodule=make(packing=packing), ckpt_path=str(tmp_path / "stopped.ckpt")
    )  # fmt: skip
    assert first.seen + rest.seen == undisturbed.seen


def test_another_packing_is_other_data(make: Any) -> None:
    prints = {
        json.dumps(options): make(**options).prepared.fingerprint
        for options in ({}, {"packing": False}, {"loss": "all"}, {"packing": False, "buckets": [48, 96]})
    }
    assert len(set(prints.values())) == len(prints)


# --- bad data


def refused(data: Callable[[], FineTuningDataModule]) -> str:
    with pytest.raises(UserError) as caught:
        list(data().train_dataloader())
    return str(caught.value)


GOOD = {"messages": chat("one?", "first")}
BAD: dict[str, tuple[Any, str]] = {
    "no columns": ([{"question": "x"}], r"rows.jsonl, line 1 has the columns question; legal: messages; prompt and"),
    "mixed": ([GOOD, {"prompt": "a", "completion": "b"}], r"rows.jsonl, line 2 has no 'messages', and the first row"),
    "null": ([GOOD, {"messages": None}], r"line 2 has no 'messages'.* it has: none"),
    "no list": ([GOOD, {"messages": "x"}], r"line 2: messages is str; legal: a list of messages"),
    "no object": ([GOOD, {"messages": ["x"]}], r"line 2: messages\[0\] is str; legal: an object with role"),
    "no role": ([GOOD, {"messages": [{"content": "x"}]}], r"line 2: messages\[0\] has no role, but content"),
    "no content": ([GOOD, {"messages": [{"role": "user"}]}], r"line 2: messages\[0\]: content is NoneType; legal"),
    "no text": ([{"text": "a"}, {"text": 7}], r"line 2: text is int; legal: a text"),
    "no completion": (
        [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 3}],
        r"line 2: prompt is str, completion is int; legal: two texts, or two lists of messages",
    ),
    "no answers": ([{"messages": chat("one?")}] * 3, r"leaves nothing to train on: 0 of 3 conversations \(3 nothing"),
    "a list": ([GOOD, [1]], r"line 2 is list; legal: an object"),
}


@pytest.mark.parametrize("kind", BAD)
def test_rows_that_are_not_what_they_should_be(make: Any, kind: str) -> None:
    rows, words = BAD[kind]
    assert re.search(words, refused(lambda: make([*rows, *rows[:1]], global_batch_size=1)))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no rows|0 rows leave nothing to hold out"),
        (b"\n\r\n\n", "0 rows leave nothing to hold out"),
        (json.dumps(GOOD).encode(), "1 rows leave nothing to hold out"),
        (json.dumps(GOOD).encode() + b"\n\n" + b'{"messages": [{"role": "m\xfc', r"line 3 is not UTF-8: byte 0xfc"),
        (json.dumps(GOOD).encode() + b'\n{"messages": [{"ro', r"line 2 is no JSON: .* one object a line"),
    ],
    ids=["empty", "empty lines", "one row", "not UTF-8", "cut short"],
)
def test_files_that_are_not_what_they_should_be(
    make: Any, tmp_path: Path, content: bytes, words: str, processes: int
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    assert re.search(words, refused(lambda: make(num_proc=processes, global_batch_size=1)))


def test_a_template_that_raises_names_the_row(make: Any, tmp_path: Path) -> None:
    template = tmp_path / "strict.jinja"
    template.write_text("{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML)
    rows = [GOOD, {"messages": chat("a", "b", system="s")}]
    text = refused(lambda: make(rows, chat_template=str(template)))
    assert re.search(r"rows.jsonl, line 2: the chat template does not take it: TemplateError: user first", text)


CHATML = TEMPLATES["chatml"]


def test_a_template_from_which_answers_cannot_be_told_names_the_row(make: Any, tmp_path: Path) -> None:
    template = tmp_path / "upper.jinja"
    template.write_text("{{ messages | length }}{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    text = refused(lambda: make([GOOD] * 2, chat_template=str(template)))
    assert re.search(r"line \d: it cannot be told which of the tokens are the answer, message 1: .*loss='all'", text)
    make(chat_template=str(template), loss="all", global_batch_size=1).setup()


def test_options_that_are_not_legal(make: Any, tmp_path: Path) -> None:
    bare = write_tokenizer(tmp_path / "bare", None)
    assert "has no chat template; legal: a chat_template" in refused(lambda: make(tokenizer=str(bare)))
    assert "chat_template='none.jinja' is no file; legal: one, or chatml" in refused(
        lambda: make(chat_template="none.jinja")
    )
    assert "buckets=[8] need packing=False" in refused(lambda: make(buckets=[8]))
    assert "the last of which is sequence_length=96" in refused(lambda: make(packing=False, buckets=[8, 4]))
    assert "columns={'chat': 'x'}; legal: names for messages" in refused(lambda: make(columns={"chat": "x"}))


@pytest.mark.parametrize(
    ("offline", "error", "words"),
    [
        (False, EntryNotFoundError("404"), "tokenizer='owner/name' has no chat template; legal: a chat_template"),
        (True, LocalEntryNotFoundError("not in the cache"), "no chat template in the Hugging Face hub's cache, and"),
        (False, LocalEntryNotFoundError("no connection"), r"whether tokenizer='owner/name' has a tokenizer_config.json"
         r" cannot be found out: .* \(LocalEntryNotFoundError: no connection\)"),
        (True, PermissionError("cache of others"), r"cannot be found out: .* \(PermissionError: cache of others\)"),
    ],
    ids=["none", "none in the cache", "no way to the hub", "a cache that cannot be read"],
)  # fmt: skip
def test_a_template_that_cannot_be_fetched_is_told_from_none(
    make: Any, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, offline: bool, error: Exception, words: str
) -> None:
    def fetched(repository: str, name: str) -> str:
        if name == "tokenizer.json":
            return str(tokenizer / name)
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    assert re.search(words, refused(lambda: make(tokenizer="owner/name")))


def test_a_template_that_the_client_knows_not_to_be_there_needs_no_way_to_the_hub(
    make: Any, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose tokenizer's configuration has it."""

    def fetched(repository: str, name: str) -> str:
        if name == "chat_template.jinja":
            raise LocalEntryNotFoundError("no connection")
        return str(tokenizer / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert "chat_template.jinja cannot be found out" in refused(lambda: make(tokenizer="owner/name"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: huggingface_hub._CACHED_NO_EXIST)
    assert torch.equal(whole(make(tokenizer="owner/name"))["labels"], whole(make())["labels"])


def test_ids_beyond_the_vocabulary(make: Any) -> None:
    data = make()
    data.setup()
    file = data.prepared.train.conversations.stream.files[0].path
    with file.open("r+b") as opened:
        opened.write(b"\xff\xff")
    assert f"{file} has 65535 as token 0 of its stream" in refused(make)


def test_parquet_is_read_as_well(make: Any, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    lines = make(packing=False)
    parquet.write_table(pyarrow.Table.from_pylist(sums(40)), tmp_path / "rows.parquet")
    table = make(path=str(tmp_path / "rows.parquet"), packing=False)
    assert torch.equal(whole(table)["labels"], whole(lines)["labels"])


def test_a_tokenizer_of_more_tokens_than_the_vocabulary(make: Any, tokenizer: Path) -> None:
    size = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab_size()
    assert make().vocab_size == size
    assert f"vocab_size=8 is too small; legal are {size}" in refused(lambda: make(vocab_size=8))


@pytest.mark.parametrize("packing", [True, False])
def test_the_end_of_a_completion_is_learnt_before_padding(make: Any, packing: bool) -> None:
    """A model leaves out a label that repeats the padding behind it."""
    data = make([{"prompt": f"{i} and {i}?", "completion": f" {2 * i}"} for i in range(200)], packing=packing)
    ends = 0
    for batch in data.train_dataloader():
        nothing = predicts_nothing(batch["input_ids"], batch["labels"], batch["attention_mask"].bool())
        ends += int(((batch["labels"] == data.end_of_document_id) & ~nothing).sum())
        assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
        assert not (nothing & (batch["labels"] != -100)).any()
    assert ends > 8
