"""Forked ranks: one deadline for all, and a failure that keeps what the others returned."""

from __future__ import annotations

import os
import time

import pytest
from helpers.forked import forked
from helpers.stopwatch import Stopwatch, patience

from lightning_tex.testing import RanksFailed, run_ranks
from lightning_tex.testing.runs import Outcome, first_told, outcomes_of


def double(number: int) -> int:
    return 2 * number


def sleep() -> None:
    time.sleep(600)


def returns_raises_or_hangs() -> str:
    rank = int(os.environ["RANK"])
    if rank == 1:
        raise ZeroDivisionError("by rank 1")
    if rank == 2:
        sleep()
    return f"rank {rank}"


def test_results_in_the_order_of_ranks():
    assert run_ranks(3, double, 21) == [42, 42, 42]


def test_one_deadline_for_all_ranks():
    watch = Stopwatch()
    with pytest.raises(RanksFailed, match=r"ranks \[0, 1, 2, 3\] were still running after 1 s"):
        run_ranks(4, sleep, timeout=1)
    assert watch.elapsed().is_within(4)


def test_a_failure_has_the_traceback_the_hung_ranks_and_what_others_returned():
    with pytest.raises(RanksFailed, match="ZeroDivisionError: by rank 1") as failure:
        run_ranks(3, returns_raises_or_hangs, timeout=patience(2))
    assert failure.value.outcomes == {0: "rank 0"}
    assert failure.value.hung == [2]
    assert "ended without a result" not in str(failure.value)


def tell_and_sleep() -> None:
    os.write(1, b"here\n")
    time.sleep(600)


def test_ranks_end_with_their_caller():
    with forked(run_ranks, 2, tell_and_sleep) as (caller, output):
        assert [output.readline() for _ in range(2)] == ["here\n"] * 2
        watch = Stopwatch()
        caller.terminate()
        assert output.read() == "", "both have closed it"
    assert watch.elapsed().is_within(30), "they would have slept for ten minutes"


def test_a_result_that_cannot_be_pickled_is_that_ranks_failure():
    with pytest.raises(RanksFailed, match="pickle"):
        run_ranks(1, lambda: lambda: None)


def told_while_another_hangs() -> Outcome:
    if os.environ["RANK"] == "0":
        sleep()
    return Outcome(error="KeyError: 'x'")


def test_an_error_that_is_there_is_told_before_a_hang():
    assert first_told(outcomes_of(2, told_while_another_hangs, timeout=patience(2))).error == "KeyError: 'x'"


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (sleep, r"ranks [0] hang: they still run after 1 s"),
        (lambda: os._exit(3), "a rank ended: ended without a result"),
    ],
)
def test_what_no_rank_tells_is_told_for_them(function, text):
    assert first_told(outcomes_of(1, function, timeout=1 if function is sleep else 60)).error == text


def left_behind() -> Outcome:
    return Outcome(error="closed by peer", follows=True) if os.environ["RANK"] == "0" else Outcome(error="the cause")


def test_a_cause_is_told_before_its_consequence():
    assert first_told(outcomes_of(2, left_behind, timeout=60)).error == "the cause"
