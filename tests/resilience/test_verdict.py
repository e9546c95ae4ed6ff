"""Which of several reports is the cause."""

from __future__ import annotations

from typing import Any

from lightning_tex.resilience.verdict import LAST_WORDS_S, TOGETHER_S, Deliberation, Report, Verdict


def reports(*kinds: str, **options: Any) -> list[Report]:
    return [Report(rank, kind, f"error of {rank}", **options) for rank, kind in enumerate(kinds)]  # type: ignore[arg-type]


def test_a_consequence_waits_for_its_cause() -> None:
    deliberation = Deliberation(4)
    consequence, death = reports("consequence", "death")
    deliberation.add(consequence, 10.0)
    assert deliberation.due == 10.0 + TOGETHER_S and deliberation.cause is None
    deliberation.add(death, 10.1)
    assert deliberation.due == 10.1 + LAST_WORDS_S and deliberation.cause == death


def test_the_first_error_is_the_cause_and_its_death_no_other_one() -> None:
    deliberation = Deliberation(2)
    error, other = reports("error", "death")
    deliberation.add(error, 1.0)
    deliberation.add(Report(0, "death", ""), 1.1)
    deliberation.add(other, 1.2)
    assert deliberation.cause == error and deliberation.of_all() is None


def test_all_ranks_that_raise_at_one_place_do_so_together() -> None:
    deliberation = Deliberation(3)
    for report in reports("error", "error", "error", step=4, number=9):
        assert deliberation.due > 1.0
        deliberation.add(report, 1.0)
    assert deliberation.due == 1.0
    assert deliberation.of_all() == Verdict("together")


def test_what_all_ranks_raise_alike_is_told_once() -> None:
    deliberation = Deliberation(2)
    for rank in range(2):
        deliberation.add(Report(rank, "error", "ValueError: no", step=4, number=9), 1.0)
    assert deliberation.of_all() == Verdict("together", text="ValueError: no")


def test_errors_at_different_steps_or_collectives_are_not_at_one_place() -> None:
    for last in (Report(1, "error", "", step=5, number=9), Report(1, "error", "", step=4, number=8)):
        deliberation = Deliberation(2)
        deliberation.add(Report(0, "error", "", step=4, number=9), 1.0)
        deliberation.add(last, 1.0)
        assert deliberation.of_all() == Verdict("apart")
