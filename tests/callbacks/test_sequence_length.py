"""Sequences that grow: the same tokens in shorter rows, by the step, through a resume and on layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.behaviour_modules import TED
from helpers.ranks import on_ranks
from helpers.trainers import quiet

from lightning_tex import LanguageModel, TexMoEStrategy, TextDataModule
from lightning_tex.callbacks import SequenceLengthSchedule
from lightning_tex.callbacks.sequence_length import divide
from lightning_tex.errors import UserValueError
from lightning_tex.models import DecoderConfig

SCHEDULE = [[0, 8], [2, 16], [4, 32]]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]


def test_rows_are_divided_and_what_is_of_a_row_is_repeated() -> None:
    batch: dict[str, Any] = {"input_ids": torch.arange(24).view(2, 12), "sample": torch.tensor([5, -1]), "source": "a"}
    batch |= {"labels": batch["input_ids"] + 1, "scores": torch.arange(48.0).view(2, 12, 2), "mean": torch.tensor(3.0)}
    divide(batch, 4)
    assert batch["input_ids"].tolist() == torch.arange(24).view(6, 4).tolist()
    assert torch.equal(batch["labels"], batch["input_ids"] + 1)
    assert batch["sample"].tolist() == [5, 5, 5, -1, -1, -1]
    assert batch["scores"].shape == (6, 4, 2)
    assert (batch["source"], batch["mean"].item()) == ("a", 3.0)


class Reader(LanguageModel):
    def __init__(self) -> None:
        torch.manual_seed(1)
        config = DecoderConfig(vocab_size=300, dim=16, num_layers=2, num_heads=4, hidden_dim=16, num_experts=4, top_k=2)
        super().__init__(config)
        self.seen: list[tuple[int, ...]] = []
        self.losses: list[torch.Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.seen.append(tuple(batch["input_ids"].shape))
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(place: Path, steps: int, layout: Any, ckpt: Path | None = None) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    data = TextDataModule(
        str(place), vocab_size=300, sequence_length=32, global_batch_size=8, cache_dir=str(place.parent / "cache")
    )  # fmt: skip
    trainer = quiet(
        max_steps=steps, devices=4 if layout else 1, strategy=TexMoEStrategy(**layout), accumulate_grad_batches=2,
        limit_val_batches=0, callbacks=[SequenceLengthSchedule(SCHEDULE)], max_epochs=-1,
    )  # fmt: skip
    module = Reader()
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    trainer.save_checkpoint(place.parent / f"{steps}.ckpt")
    return module.seen, trainer.strategy.reduce(torch.stack(module.losses), reduce_op="mean")


def test_each_step_has_its_length_through_a_resume_and_on_a_layout(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i:02d}.txt").write_text(f"text number {i} says {i * i} " * 9)
    ((whole, losses),) = on_ranks(1, fit, tmp_path / "text", 5, {})
    assert whole == [(32, 8)] * 4 + [(16, 16)] * 4 + [(8, 32)] * 2
    for shapes, shared in on_ranks(4, fit, tmp_path / "text", 3, TED):
        assert shapes == [(16, 8)] * 4 + [(8, 16)] * 2
        torch.testing.assert_close(shared, losses[:6], rtol=1e-5, atol=0)
    ((rest, resumed),) = on_ranks(1, fit, tmp_path / "text", 5, {}, tmp_path / "3.ckpt")
    assert rest == whole[6:]
    torch.testing.assert_close(resumed, losses[6:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("lengths", [[], [[3, 8], [3, 16]], [[0, 0]], [[0, 8, 9]]])
def test_a_schedule_that_is_none(lengths: Any) -> None:
    with pytest.raises(UserValueError, match="legal: pairs of a step and a length of 1 or more, steps rising"):
        SequenceLengthSchedule(lengths)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"input_ids": torch.zeros(2, 12)}, r"input_ids of shape \(2, 12\) cannot be divided into rows of 5"),
        ([torch.zeros(2, 10)], "a list cannot be divided into rows of 5; legal: a dict with input_ids"),
    ],
)
def test_batches_that_cannot_be_divided(batch: Any, words: str) -> None:
    with pytest.raises(UserValueError, match=words):
        divide(batch, 5)
