"""The rule by which a loss is a spike."""

from __future__ import annotations

from math import inf, nan

import pytest

from lightning_tex.parallel.errors import UserValueError
from lightning_tex.resilience.spikes import SpikeDetector, SpikeRule

RULE = SpikeRule(window=10, least=4, deviations=3, relative=0.1, patience=3)


def judged(losses: list[float]) -> list[bool]:
    detector = SpikeDetector(RULE)
    return [detector.is_spike(loss) for loss in losses]


def test_a_loss_far_above_the_last_ones_is_a_spike_once_enough_are_known() -> None:
    assert judged([4, 9, 4, 4]) == [False] * 4, "too few are known"
    assert judged([4, 4.2, 4, 4.2, 4.4]) == [False] * 5, "three deviations of 0.1 and a tenth of 4.1 are above 4.4"
    assert judged([4, 4.2, 4, 4.2, 4.6]) == [False] * 4 + [True]
    assert judged([4, 4, 4, 4, 4.3]) == [False] * 5, "a flat loss has no deviation"
    assert judged([4, 4, 4, 4, 9, 4, 9]) == [False, False, False, False, True, False, True], "9 entered no mean"


def test_what_is_not_finite_is_left_to_others() -> None:
    assert judged([4, 4, 4, 4, nan, inf, 9]) == [False] * 6 + [True]


def test_a_level_that_stays_is_taken_for_the_new_one() -> None:
    assert judged([4, 4, 4, 4, 9, 9, 9, 9, 9, 9, 9]) == [False] * 4 + [True] * 3 + [False] * 4


def test_numbers_that_are_not_legal() -> None:
    for options in ({"least": 1}, {"least": 60}, {"deviations": 0}, {"relative": -1}, {"patience": 0}):
        with pytest.raises(UserValueError, match="legal"):
            SpikeRule(**options)
