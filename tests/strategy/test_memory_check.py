"""A training that does not fit is refused at the start, on all ranks, with what would fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
from helpers.own_modules import TwoKinds, regression
from helpers.ranks import on_ranks, together
from helpers.trainers import quiet
from torch.utils.data import DataLoader, IterableDataset

from lightning_tex import LanguageModel, TexMoEStrategy
from lightning_tex.models import DecoderConfig
from lightning_tex.parallel.layout import Layout
from lightning_tex.planner.batches import Batches, GrownBatch
from lightning_tex.planner.describe import describe
from lightning_tex.planner.layouts import Candidate, Job
from lightning_tex.planner.memory import Memory, memory
from lightning_tex.planner.optimizer_trial import read_optimizer
from lightning_tex.planner.traced import TracedActivations
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
    cases = {"fits": (fit, 1 << 30, {}), "left out": (fit, 1000, {"check_memory": False}), "on CPU": (fit, None, {})}
    assert together(2, cases) == dict.fromkeys(cases, ["trained"] * 2)


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


class ByPlainSteps(Trained):
    """The same, without states; the experts of the second layer stay as they are."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.second.requires_grad_(False)
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Streaming(Trained):
    """The same on data that can be read once."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Once(), batch_size=8)


class Once(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from torch.randn(64, 16)


PLAIN = {"tensor_parallel_size": 1, "expert_parallel_size": 1, "zero_stage": 0}


def planned(module: L.LightningModule, batches: Batches | None, share: int) -> Memory:
    """What a rank of two needs, without anything sharded."""
    source = None if batches is None else TracedActivations(module, None, batches)
    job = Job(describe(module), 2, 1, 2 * share, "32-true", optimizer=read_optimizer(module), activations=source)
    return memory(job, Candidate(Layout(2), share, zero_stage=0))


@pytest.mark.parametrize(
    ("build", "batches", "share"),
    [
        pytest.param(regression, GrownBatch([torch.randn(4, 16), torch.randn(4)], 4), 32, marks=pytest.mark.full),
        (Trained, GrownBatch(torch.randn(4, 16), 4), 8),
    ],
    ids=["the recipe's", "experts of two kinds"],
)
def test_a_module_of_ones_own_is_refused_when_its_traced_step_does_not_fit(
    build: Callable[[], L.LightningModule], batches: Batches, share: int
) -> None:
    needed, states = planned(build(), batches, share).peak, planned(build(), None, share).peak
    fits = int(needed * (1 - MARGIN)) + 1
    assert fits > states * (1 - MARGIN), "what its states alone would have passed"
    assert on_ranks(2, fit, fits, PLAIN, build) == ["trained"] * 2
    for said in on_ranks(2, fit, fits - 2, PLAIN, build):
        assert "needs about" in said and f"activations of micro-batches of {share}: traced" in said
        assert "expert parameters" in said and "states of AdamW" in said
        assert re.search(r"What fits, nearest first: (zero_stage|expert_parallel_size|micro_batch)=", said), said
    for said in on_ranks(2, fit, 100, PLAIN, build):
        assert "No layout of so many ranks fits" in said


def test_what_cannot_be_traced_is_refused_when_its_states_do_not_fit() -> None:
    fits = int(planned(Streaming(), None, 8).peak * (1 - MARGIN)) + 1
    assert on_ranks(2, fit, fits, PLAIN, Streaming) == ["trained"] * 2
    for said in on_ranks(2, fit, fits - 2, PLAIN, Streaming):
        assert "without activations: no batch of its data" in said and "only be iterated over" in said


def test_frozen_parameters_and_sgd_fit_where_adamw_does_not() -> None:
    batches = GrownBatch(torch.randn(4, 16), 4)
    enough = int(planned(ByPlainSteps(), batches, 8).peak) + 1
    assert on_ranks(2, fit, enough, PLAIN, ByPlainSteps) == ["trained"] * 2
    for said in on_ranks(2, fit, enough, PLAIN, Trained):
        assert "states of AdamW" in said
