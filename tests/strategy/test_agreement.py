"""What differs between ranks is refused at the start, on all of them, naming it with the ranks and values."""

from __future__ import annotations

import pytest
from helpers.behaviour_modules import on_ranks
from helpers.mismatches import MODEL, OPTIMIZER, STRATEGY, TRAINER, Mismatch, what_was_said

# Seconds within which a difference is to be named.
_SOON = 10


@pytest.mark.parametrize(
    "mismatches", [STRATEGY, TRAINER, MODEL, OPTIMIZER], ids=["strategy", "trainer", "model", "optimizer"]
)
def test_a_rank_that_differs_is_named_on_all_ranks(mismatches: dict[str, Mismatch]) -> None:
    for said in on_ranks(2, what_was_said, mismatches):
        for name, mismatch in mismatches.items():
            text, seconds = said[name]
            assert all(words in text for words in mismatch.words), (name, text)
            assert seconds < _SOON, (name, seconds)
