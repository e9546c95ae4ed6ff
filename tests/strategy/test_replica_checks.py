"""A copy that drifts is found in the first steps, and what is declared does not drift."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from helpers.normed_attention import Declared, HeadNorms, fit_normed
from torch import Tensor

from lightning_tex.parallel.errors import UserRuntimeError, UserValueError
from lightning_tex.strategy.replica_checks import ReplicaChecks
from lightning_tex.testing.ranks import run_ranks

LAYOUTS: list[dict[str, Any]] = [
    {"tensor_parallel_size": 2},
    {"tensor_parallel_size": 4},
    {"tensor_parallel_size": 2, "zero_stage": 2, "sequence_parallel": True},
    {"tensor_parallel_size": 2, "zero_stage": 0, "expert_tensor_parallel_size": 1},
]


@pytest.fixture(scope="module")
def one_process() -> dict[str, Tensor]:
    return run_ranks(1, fit_normed, Declared, 3)[0]


@pytest.mark.parametrize("layout", [LAYOUTS[0], *(pytest.param(more, marks=pytest.mark.full) for more in LAYOUTS[1:])])
def test_declared_partial_gradients_are_exact(layout: dict[str, Any], one_process: dict[str, Tensor]) -> None:
    for parameters in run_ranks(4, partial(fit_normed, Declared, 3, **layout)):
        for name, expected in one_process.items():
            torch.testing.assert_close(parameters[name], expected, rtol=1e-10, atol=1e-12, msg=name)


def undeclared(steps: int) -> str:
    with pytest.raises(UserRuntimeError) as caught:
        fit_normed(HeadNorms, steps, tensor_parallel_size=2)
    return str(caught.value)


def test_a_norm_over_heads_is_found_after_the_first_step_with_the_remedy() -> None:
    said = run_ranks(4, undeclared, 3)
    assert len(set(said)) == 1
    for words in (
        "after step 1",
        "attend.query_norm.weight",
        "over tensor",
        "rank(s) 0 and another on rank(s) 1",
        "declare, in HeadNorms: partial_gradients = ('query_norm',)",
    ):
        assert words in said[0], said[0]


@pytest.mark.parametrize(
    ("period", "stride", "expected"),
    [
        (10, 1, [0, 1, 2, 4, 8, 10, 20]),
        (1, 1, list(range(26))),
        (10, 3, [0, 3, 6, 9, 12, 21]),  # several optimizer steps between two boundaries
        (0, 1, []),
    ],
)
def test_copies_are_compared_often_at_first(
    period: int, stride: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []
    monkeypatch.setattr(ReplicaChecks, "_compare", lambda self, when: compared.append(when))
    checks = ReplicaChecks(None, period)  # type: ignore[arg-type]
    checks.fit_begins()
    for step in range(0, 26, stride):
        checks.step_boundary(step)
        checks.step_boundary(step)  # between two micro-batches
    assert compared == [f"after step {step}" if step else "at the start" for step in expected]


def test_a_negative_period_is_refused() -> None:
    with pytest.raises(UserValueError, match="check_replicas_every_n_steps=-1; legal"):
        ReplicaChecks(None, -1)  # type: ignore[arg-type]
