"""A small corpus, its data module, and a module that writes down which samples it was given."""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from helpers.trainers import quiet
from hypothesis import settings

from lightning_tex.data import TextDataModule

# A shared machine may stall for longer than hypothesis allows an example.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

WORDS = ["tensor", "expert", "data", "token", "route", "gate", "the", "of", "to", "a", "müßig"]


def document(number: int) -> str:
    words = (WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(40 + number % 13))
    return f"Document {number}\n" + " ".join(words) + "\n"


@pytest.fixture(autouse=True)
def _own_caches(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("LIGHTNING_TEX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return [document(i) for i in range(60)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory, documents) -> Path:
    """A user's own folder of text files, some of them deeper."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "deeper").mkdir()
    for i, text in enumerate(documents):
        place = root / "deeper" if i % 2 else root
        (place / f"{i:03d}.{'md' if i % 3 else 'txt'}").write_text(text, encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory, documents) -> Path:
    file = tmp_path_factory.mktemp("jsonl") / "corpus.jsonl"
    file.write_text("".join(json.dumps({"body": text, "id": i}) + "\n" for i, text in enumerate(documents)))
    return file


@pytest.fixture
def make(folder):
    """Makes data modules of the small corpus; options override."""

    def make_data(**options) -> TextDataModule:
        settings = {"path": str(folder), "vocab_size": 300, "sequence_length": 32, "global_batch_size": 8}
        return TextDataModule(**(settings | options))

    return make_data


class Recorder(pl.LightningModule):
    """Trains one weight and remembers the samples of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.validated: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["sample"].tolist())
        return self.weight * batch["input_ids"].float().mean()

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch["sample"].tolist())

    def predict_step(self, batch, batch_idx):
        return batch["sample"].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def recorder():
    return Recorder


@pytest.fixture
def trainer(tmp_path):
    """Makes quiet single-process Trainers; options override."""

    def make_trainer(**options) -> pl.Trainer:
        return quiet(**({"devices": 1, "num_sanity_val_steps": 0, "default_root_dir": tmp_path} | options))

    return make_trainer
