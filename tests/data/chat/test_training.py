"""Conversations train as each by itself, on layouts; and a model learns to copy, of answers alone."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.behaviour_modules import TED, new_trainer
from helpers.chats import CHATML, chat, write_lines, write_tokenizer
from helpers.layout_errors import distance
from helpers.ranks import on_ranks
from helpers.trainers import gathered, quiet
from tokenizers import Tokenizer
from torch import Tensor

from lightning_tex import FineTuningDataModule, LanguageModel
from lightning_tex.data.chat.template import ChatTemplate
from lightning_tex.models import DecoderConfig

WORDS = ["token", "expert", "route", "gate", "data"]
ROWS = 8


class Learner(LanguageModel):
    """Keeps its losses; SGD."""

    def __init__(self, vocab_size: int, **changes: Any) -> None:
        sizes = {"dim": 16, "num_layers": 2, "num_heads": 4, "hidden_dim": 16, "num_experts": 4, "top_k": 2}
        super().__init__(DecoderConfig(vocab_size, **{**sizes, "z_loss_coefficient": 0.01, **changes}))
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_callbacks(self) -> list[L.Callback]:
        return []


def conversations(folder: Path) -> None:
    """Of one to three answers, which fill 8 rows and some of them not quite."""
    write_tokenizer(folder / "tokenizer")
    turns = [
        [f"{WORDS[i % 5]} {i}?" if t % 2 == 0 else WORDS[(i + t) % 5] for t in range(2 + i % 3)] for i in range(21)
    ]
    write_lines(folder / "rows.jsonl", [{"messages": chat(*contents)} for contents in turns])


def module_of(folder: Path, **options: Any) -> FineTuningDataModule:
    usual = {"tokenizer": str(folder / "tokenizer"), "sequence_length": 128, "cache_dir": str(folder / "cache")}
    return FineTuningDataModule(str(folder / "rows.jsonl"), **{**usual, "num_proc": 1, **options})


def fit(folder: Path, layout: dict[str, Any] | None, packing: bool) -> dict[str, Tensor]:
    """One step on all conversations."""
    L.seed_everything(3, verbose=False)
    data = module_of(folder, packing=packing)
    samples = len(data.prepared.train)
    data.global_batch_size = samples
    module, trainer = Learner(data.vocab_size), new_trainer(layout, max_steps=2, max_epochs=2, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    losses = trainer.strategy.reduce(torch.stack(module.losses), reduce_op="mean")
    return {"samples": torch.tensor(float(samples)), "losses": losses, **gathered(module, trainer)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("conversations")
    conversations(place)
    return place


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Tensor]:
    """Each conversation in a row of its own, in one process."""
    return on_ranks(1, fit, folder, None, False)[0]


LAYOUTS: dict[str, Any] = {
    "ted": TED,
    "data, sequence parallel": {"tensor_parallel_size": 2, "expert_parallel_size": 1, "sequence_parallel": True},
    "data 4": {},
    "folded": {"tensor_parallel_size": 2, "expert_parallel_size": 4, "expert_tensor_parallel_size": 1},
}


@pytest.mark.parametrize("packing", [True, pytest.param(False, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "layout", ["ted", *(pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS if name != "ted")]
)
def test_packed_conversations_train_as_each_alone_in_one_process(
    folder: Path, alone: dict[str, Tensor], layout: str, packing: bool
) -> None:
    for rank, got in enumerate(on_ranks(4, fit, folder, LAYOUTS[layout], packing)):
        assert got.pop("samples") == (ROWS if packing else alone["samples"])
        for name, value in got.items():
            error = distance(value.double(), alone[name].double())
            assert error <= 1e-10, f"rank {rank}, {name}: {error:.1e}"


def test_packed_conversations_train_as_each_alone_on_one_layout_of_one(folder: Path, alone: dict[str, Tensor]) -> None:
    packed = on_ranks(1, fit, folder, None, True)[0]
    assert packed.pop("samples") == ROWS < alone["samples"] == 20
    for name, value in packed.items():
        assert distance(value.double(), alone[name].double()) <= 1e-10, name


class Copier(Learner):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@torch.no_grad()
def loss_of(module: LanguageModel, data: FineTuningDataModule) -> float:
    total, count = map(sum, zip(*(module._loss_sum(batch) for batch in data.val_dataloader()), strict=True))
    return float(total / count)


def copied(folder: Path) -> tuple[float, float, list[bool]]:
    """Losses of answers and of all tokens, and whether words are answered by themselves."""
    words = [a + b for a in WORDS for b in WORDS]
    write_lines(folder / "rows.jsonl", [{"messages": chat(word, word)} for word in words * 4])
    write_tokenizer(folder / "tokenizer")
    make = functools.partial(module_of, folder, sequence_length=64, global_batch_size=8)
    data = make()
    L.seed_everything(1, verbose=False)
    module = Copier(data.vocab_size, num_experts=2, top_k=1, dim=32, hidden_dim=32, max_sequence_length=64)
    quiet(devices=1, max_steps=100, limit_val_batches=0).fit(module, datamodule=data)
    module.eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    template = ChatTemplate(CHATML, {})
    right = []
    for word in words[::6]:
        prompt = tokenizer.encode(template.render(chat(word), add_generation_prompt=True)).ids
        said = module.generate(torch.tensor([prompt]), 12, temperature=0)[0, len(prompt) :].tolist()
        right.append(data.decode(said).partition("<|im_end|>")[0] == word)
    return loss_of(module, make()), loss_of(module, make(loss="all")), right


def test_a_model_learns_to_copy_of_answers_alone(tmp_path: Path) -> None:
    answers, everything, right = on_ranks(1, copied, tmp_path)[0]
    assert answers < 0.05
    assert everything > 2, "it has learnt the questions, too"
    assert all(right)
