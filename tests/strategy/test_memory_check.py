"""A training that does not fit is refused at the start, on all ranks, with what would fit."""

from __future__ import annotations

import re
from typing import Any

import lightning as L
import torch
from helpers.behaviour_modules import on_ranks
from helpers.trainers import quiet
from torch.utils.data import DataLoader

from lightning_tex import LanguageModel, TexMoEStrategy
from lightning_tex.models import DecoderConfig

SIZES = DecoderConfig(260, 64, 2, 4, hidden_dim=256, max_sequence_length=32, num_experts=4)


class Random(L.LightningDataModule):
    """Random tokens, with the sizes that a TextDataModule tells."""

    sequence_length, global_batch_size = 32, 8

    def train_dataloader(self) -> DataLoader[Any]:
        ids = torch.randint(260, (64, 32))
        batches = [{"input_ids": row, "labels": row} for row in ids]
        share = self.global_batch_size // self.trainer.strategy.topology.layout.data
        return DataLoader(batches, batch_size=share)  # type: ignore[arg-type]


def fit(device_bytes: int | None, options: dict[str, Any]) -> str:
    """What the fit raises before its first step, or ``trained``."""
    strategy = TexMoEStrategy(**options)
    strategy._device_bytes = lambda: device_bytes  # type: ignore[method-assign]
    data = Random()
    trainer = quiet(devices=2, strategy=strategy, max_steps=1, limit_val_batches=0)
    try:
        trainer.fit(LanguageModel(SIZES), data)
    except ValueError as error:
        return str(error)
    return "trained"


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    options = {"tensor_parallel_size": 1, "expert_parallel_size": 1, "zero_stage": 0}
    for said in on_ranks(2, fit, 4_700_000, options):
        assert "needs about" in said and "expert parameters" in said and "check_memory=False" in said
        assert "What fits, nearest first" in said
        first = said.split("nearest first: ")[1].split(";")[0]
        assert re.search(r"(zero_stage|expert_parallel_size|tensor_parallel_size|micro_batch|checkpointing)=", first)


def test_what_fits_trains_and_the_check_can_be_left_out() -> None:
    assert on_ranks(2, fit, 1 << 30, {}) == ["trained"] * 2
    assert on_ranks(2, fit, 1000, {"check_memory": False}) == ["trained"] * 2
    assert on_ranks(2, fit, None, {}) == ["trained"] * 2, "on CPU nothing is checked"


def test_nothing_fits() -> None:
    for said in on_ranks(2, fit, 1000, {}):
        assert "No layout of so many ranks fits" in said
