"""What counts as a difference, and what speaks against a module."""

from __future__ import annotations

import random
from math import inf, nan

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_tex.moe import MoE
from lightning_tex.parallel.errors import UserValueError, left_by_another_rank
from lightning_tex.testing import Difference, Run, Verdict, compare_layouts, legal_layouts
from lightning_tex.testing.differences import differences, relative_difference
from lightning_tex.testing.recording import Record, Step, watched
from lightning_tex.testing.runs import Job
from lightning_tex.testing.sliced_capacity import decide_overflow_as
from lightning_tex.testing.verdict import complaint

RUN = Run(2)
ALIKE, DIFFERS = Verdict(RUN), Verdict(RUN, first=Difference("step 1: loss differs", 0.5))
FAILED, NOT_TRIED = Verdict(RUN, error="raised: KeyError"), Verdict(RUN, skipped="3 samples")


def record(loss: float = 1.0, rounding: float = 0.0, size: float = 1.0) -> Record:
    gradients = {"weight": torch.full((4,), size), "bias": torch.tensor([rounding])}
    return Record([Step(loss, 2 * size, gradients)], {"weight": torch.ones(4), "bias": torch.tensor([rounding])})


def test_a_tensor_that_is_zero_in_theory_is_held_to_a_share_of_all():
    assert differences(record(rounding=1e-13), record(rounding=-2e-13), 1e-8)[0] is None
    first, _ = differences(record(rounding=1e-13), record(rounding=1e-6), 1e-8)
    assert first is not None and first.what == "step 1: gradient of bias differs"
    assert first.relative == pytest.approx(1e-6 / 2e-3, rel=1e-3)
    assert relative_difference(torch.ones(4), torch.full((4,), 2.0)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("expected", "actual", "text"),
    [
        (record(), record(loss=1.5), "step 1: loss differs by 0.5 of its 2-norm"),
        (record(), record(loss=nan), "step 1: loss is not finite"),
        (record(loss=nan), record(loss=nan), "step 1: loss is not finite in one process either"),
        (record(), record(size=inf), "step 1: gradient of weight is not finite"),
        (record(), Record(), "the number of steps is 0, in one process 1"),
    ],
)
def test_a_difference_has_a_number_only_where_there_is_one(expected, actual, text):
    actual.parameters = actual.parameters or expected.parameters
    assert str(differences(expected, actual, 1e-8)[0]) == text


def test_the_status_of_a_verdict():
    verdicts = (ALIKE, DIFFERS, FAILED, NOT_TRIED)
    assert [verdict.status for verdict in verdicts] == ["alike", "differs", "failed", "not tried"]
    assert [verdict.alike for verdict in verdicts] == [True, False, False, False]


def test_what_could_not_be_tried_speaks_against_it_only_where_it_was_named_or_was_all():
    assert complaint([ALIKE, NOT_TRIED], named=False) is None
    named = complaint([ALIKE, NOT_TRIED], named=True)
    assert named == "1 of 2 layouts could not be tried:\n  devices=2: could not be tried: 3 samples"
    assert "could not be tried" in complaint([NOT_TRIED], named=False)
    both = complaint([DIFFERS, FAILED, NOT_TRIED], named=False)
    assert both.startswith("2 of 3 layouts do not train as one process does:") and "tried" not in both
    assert complaint([], named=True) == "there is no layout to try"


def test_options_that_the_strategy_does_not_know_and_missing_devices():
    with pytest.raises(UserValueError, match=r"takes no tensor_parallel_sise; legal: .*tensor_parallel_size"):
        Run.of({"devices": 2, "tensor_parallel_sise": 2})
    with pytest.raises(UserValueError, match="without devices"):
        Run.of({"tensor_parallel_size": 2})
    with pytest.raises(UserValueError, match="takes no tile"):
        legal_layouts(nn.Linear(2, 2), (1,), tile=2)
    assert Run.of(RUN) is RUN
    with pytest.raises(UserValueError, match="sise"):  # before anything is trained
        compare_layouts(lambda: pytest.fail("built"), [{"devices": 1, "sise": 2}])


def test_a_precision_without_a_tolerance():
    with pytest.raises(UserValueError, match="precision='bf16-mixed' needs a tolerance; legal without one: '64-true'"):
        compare_layouts(lambda: pytest.fail("built"), precision="bf16-mixed")


def test_tokens_that_are_no_equal_shares_are_refused():
    layer = MoE(8, 8, 4, top_k=2, capacity_factor=0.75)
    decide_overflow_as(layer, 3)
    assert layer(torch.randn(6, 8)).shape == (6, 8)
    for tokens in (2, 7):
        with pytest.raises(UserValueError, match=f"{tokens} tokens .* no equal shares of 3 data ranks"):
            layer(torch.randn(tokens, 8))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.Dropout(0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


def test_a_recomputation_that_stops_early_leaves_no_name_behind():
    module, notes, running = Checkpointed(), Record(), []
    with watched(module, notes, running):
        module(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert running == []
    assert notes.widths == {"block.0": 4, "block.2": 4}


def test_every_process_draws_alike():
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002 - the global one is seeded

    def build() -> tuple[nn.Module, tuple[float, float, float]]:
        return nn.Linear(1, 1), draws()

    job = Job(build, optimizer=None)
    assert (job.made()[1], draws()) == (job.made()[1], draws())


@pytest.mark.parametrize(
    ("error", "left"),
    [
        (RuntimeError("[gloo] Connection closed by peer"), True),
        (RuntimeError("Connection reset by peer"), True),
        (RuntimeError("shapes"), False),
        (OSError("Connection reset by peer"), False),
    ],
)
def test_what_is_only_a_consequence_of_another_ranks_end(error, left):
    assert left_by_another_rank(error) is left
