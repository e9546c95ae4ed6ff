"""Conversations beside text in a mixture: each row is as its source alone has it, on every data axis."""

from __future__ import annotations

import functools
from itertools import chain
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
from helpers.cases import case
from helpers.chats import sums, write_lines, write_tokenizer
from helpers.trainers import quiet
from huggingface_hub.errors import EntryNotFoundError

from lightning_tex import LanguageModel
from lightning_tex.data import ChatSource, FineTuningDataModule, MixtureDataModule, TextDataModule, TextSource
from lightning_tex.data.order import Share
from lightning_tex.errors import UserValueError
from lightning_tex.models import DecoderConfig

S, G = 64, 8
pytestmark = [pytest.mark.filterwarnings("ignore:.*does not have many workers")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixed")
    (root / "text").mkdir()
    for i in range(40):
        (root / "text" / f"{i:02d}.txt").write_text(f"text number {i} says {i * i} " * (3 + i % 5))
    write_lines(root / "chats.jsonl", sums(120))
    write_tokenizer(root / "tokenizer")
    return root


def options(place: Path) -> dict[str, Any]:
    usual = {"sequence_length": S, "global_batch_size": G, "num_proc": 1}
    return {**usual, "tokenizer": str(place / "tokenizer"), "cache_dir": str(place / "cache")}


def mixture(place: Path, rank: int = 0, ranks: int = 1, **more: Any) -> MixtureDataModule:
    sources: dict[str, Any] = {
        "text": TextSource(str(place / "text")),
        "chats": ChatSource(str(place / "chats.jsonl"), loss="answers", weight={0: 1, 9: 3}),
    }
    data = MixtureDataModule(**{"sources": sources, "document_mask": True, **options(place), **more})
    data._share = functools.partial(Share, G, ranks, rank)  # type: ignore[method-assign]
    return data


def test_rows_are_those_of_their_sources(place: Path) -> None:
    chats = FineTuningDataModule(str(place / "chats.jsonl"), **options(place)).prepared.train
    data = mixture(place)
    end = data.end_of_document_id
    text = TextDataModule(str(place / "text"), document_mask=True, end_of_document=data.decode([end]), **options(place))
    assert text.end_of_document_id == end
    of_text = len(text.prepared.train)  # type: ignore[arg-type]
    seen = set()
    for batch in data.train_dataloader():
        for row, sample in enumerate(batch["sample"].tolist()):
            if sample >= of_text:
                expected = chats[[sample - of_text]]  # type: ignore[index]
            else:
                expected = text._collate(text.prepared.train[[sample]])  # type: ignore[index]
                assert batch["attention_mask"][row].all()
            seen.add(sample >= of_text)
            for name in expected.keys() - {"sample"}:
                assert torch.equal(batch[name][row], expected[name][0]), name
    assert seen == {True, False}


def test_the_same_on_every_data_axis_and_gone_on_with(place: Path) -> None:
    alone = list(mixture(place).train_dataloader())
    for ranks in (2, 4, 8):
        with case(ranks=ranks):
            shares = [list(mixture(place, rank, ranks).train_dataloader()) for rank in range(ranks)]
            for whole, parts in zip(alone, zip(*shares, strict=True), strict=True):
                for name, values in whole.items():
                    assert torch.equal(values, torch.cat([part[name] for part in parts])), name
    data = mixture(place)
    iterator = iter(data.train_dataloader())
    first = [next(iterator)["sample"].tolist() for _ in range(3)]
    again = mixture(place)
    again.load_state_dict(data.state_dict())
    rest = [batch["sample"].tolist() for batch in again.train_dataloader()]
    assert list(chain(first, rest)) == [batch["sample"].tolist() for batch in alone]


class Model(LanguageModel):
    def __init__(self, vocab_size: int) -> None:
        super().__init__(DecoderConfig(vocab_size, dim=16, num_layers=2, num_heads=2, hidden_dim=16, num_experts=2))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_model_trains_and_has_the_loss_of_each(place: Path) -> None:
    data = mixture(place)
    trainer = quiet(devices=1, max_steps=4, val_check_interval=2, num_sanity_val_steps=0)
    trainer.fit(Model(data.vocab_size), datamodule=data)
    assert {"val_loss", "val_loss/text", "val_loss/chats"} <= trainer.callback_metrics.keys()


def test_as_a_recipe_has_them(place: Path) -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(MixtureDataModule, "data")
    sources = '{"text": {"path": "a"}, "chats": {"path": "b.jsonl", "loss": "answers", "weight": 3}}'
    given = [f"--data.sources={sources}", f"--data.tokenizer={place / 'tokenizer'}", "--data.document_mask=true"]
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    data = instantiate(parser.parse_args(given)).data
    kinds = [type(source) for source in data._preparation.sources.values()]
    assert kinds == [TextSource, ChatSource]
    assert data._preparation.sources["chats"].weight == 3


@pytest.mark.parametrize("more", [{"tokenizer": None}, {"document_mask": False}], ids=str)
def test_what_conversations_need(place: Path, more: Any) -> None:
    with pytest.raises(UserValueError, match=r"source 'chats' is of conversations, .*; legal: a tokenizer, and docum"):
        mixture(place, **more)


def test_the_template_of_a_tokenizer_of_the_hub_is_found(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose client keeps each file under a name of its own, to which the names in a folder are links."""
    blobs = place / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted((place / "tokenizer").iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
    kept = {file.name: blobs / str(number) for number, file in enumerate(sorted((place / "tokenizer").iterdir()))}

    def fetched(repository: str, name: str) -> str:
        if name not in kept:
            raise EntryNotFoundError("404")
        return str(kept[name])

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    data = mixture(place, tokenizer="owner/name", vocab_size=320)
    assert data.prepared.fingerprint == mixture(place).prepared.fingerprint
