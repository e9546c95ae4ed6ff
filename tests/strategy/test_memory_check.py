"""A training that does not fit is refused at the start, on all ranks, with what would fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from helpers.own_modules import TwoKinds, regression
from helpers.ranks import on_ranks
from helpers.trainers import quiet
from torch.utils.data import DataLoader

from lightning_tex import LanguageModel, TexMoEStrategy
from lightning_tex.models import DecoderConfig
from lightning_tex.parallel.topology import Layout
from lightning_tex.planner.describe import describe
from lightning_tex.planner.layouts import Candidate, Job
from lightning_tex.planner.memory import memory
from lightning_tex.strategy.memory_check import MARGIN

SIZES = DecoderConfig(260, 64, 2, 4, hidden_dim=256, max_sequence_length=32, num_experts=4)


class Random(L.LightningDataModule):
    """Random tokens, with the sizes that a TextDataModule tells."""

    sequence_length, global_batch_size = 32, 8

    def train_dataloader(self) -> DataLoader[Any]:
        ids = torch.randint(260, (64, 32))
        batches = [{"input_ids": row, "labels": row} for row in ids]
        share = self.global_batch_size // self.trainer.strategy.topology.layout.data
        return DataLoader(batches, batch_size=share)  # type: ignore[arg-type]


def fit(device_bytes: int | None, options: dict[str, Any], build: Callable[[], L.LightningModule] | None = None) -> str:
    """What the fit of a language model, or of what is built, raises before its first step, or ``trained``."""
    strategy = TexMoEStrategy(**options)
    strategy._device_bytes = lambda: device_bytes  # type: ignore[method-assign]
    trainer = quiet(devices=2, strategy=strategy, max_steps=1, limit_val_batches=0)
    try:
        if build is None:
            trainer.fit(LanguageModel(SIZES), Random())
        else:
            trainer.fit(build())
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


class Trained(TwoKinds):
    """TwoKinds on random samples."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self(batch).square().mean()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.randn(32, 16), batch_size=8)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


@pytest.mark.parametrize("build", [regression, Trained])
def test_a_module_of_ones_own_is_refused_when_its_states_do_not_fit(build: Callable[[], L.LightningModule]) -> None:
    options = {"tensor_parallel_size": 1, "expert_parallel_size": 1, "zero_stage": 0}
    job = Job(describe(build()), 2, 1, 2, "32-true", two_groups=False)
    needed = memory(job, Candidate(Layout(2), zero_stage=0)).peak
    fits = int(needed * (1 - MARGIN)) + 1
    assert on_ranks(2, fit, fits, options, build) == ["trained"] * 2
    for said in on_ranks(2, fit, fits - 2, options, build):
        assert "needs about" in said and "without activations, which are not foreseen" in said
        assert "expert parameters" in said
        assert re.search(r"What fits, nearest first: (zero_stage|expert_parallel_size)=", said), said
    for said in on_ranks(2, fit, 100, options, build):
        assert "No layout of so many ranks fits" in said
