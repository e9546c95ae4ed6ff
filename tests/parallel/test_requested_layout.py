"""Sizes that follow the world, by the rule that is said."""

from __future__ import annotations

import pytest

from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.requested_layout import RequestedLayout

FOLDED = {"tensor_parallel_size": 2, "expert_parallel_size": 8, "expert_tensor_parallel_size": 1}


@pytest.mark.parametrize(
    ("asked", "world", "layout"),
    [
        ({"tensor_parallel_size": 4, "expert_parallel_size": 4}, 16, Layout(16, 4, 4, 4)),  # as asked
        ({"tensor_parallel_size": 4, "expert_parallel_size": 4}, 8, Layout(8, 4, 2, 4)),
        ({"tensor_parallel_size": 4, "expert_parallel_size": 4}, 6, Layout(6, 2, 1, 2)),
        ({"tensor_parallel_size": 4, "expert_parallel_size": 4}, 3, Layout(3, 1, 1, 1)),
        (
            {"tensor_parallel_size": 2, "expert_parallel_size": 8, "expert_tensor_parallel_size": 1},
            12,
            Layout(12, 2, 4, 1),
        ),
        ({"tensor_parallel_size": 4, "expert_tensor_parallel_size": 4}, 2, Layout(2, 2, 1, 2)),
        ({"tensor_parallel_size": 2}, 6, Layout(6, 2, 1, 2)),
    ],
    ids=str,
)
def test_fitted(asked: dict[str, int], world: int, layout: Layout) -> None:
    assert RequestedLayout(**asked, elastic=True).resolve(world, [8]) == layout


def test_only_when_asked() -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size=4 does not divide the world of 6"):
        RequestedLayout(tensor_parallel_size=4).resolve(6)


def test_what_was_never_legal_is_not_fitted() -> None:
    asked = RequestedLayout(tensor_parallel_size=4, expert_tensor_parallel_size=2, elastic=True)
    with pytest.raises(ValueError, match="expert_tensor_parallel_size=2"):
        asked.resolve(16)


def test_departures_are_said() -> None:
    asked = RequestedLayout(tensor_parallel_size=4, expert_parallel_size=4, elastic=True)
    assert asked.departures(asked.resolve(6, [8])) == ["tensor_parallel_size 4 -> 2", "expert_parallel_size 4 -> 1"]
    assert asked.departures(asked.resolve(16, [8])) == []
