"""Whom the others wait for, from what they say."""

from __future__ import annotations

import json

from lightning_tex.resilience.stall import stalled_ranks, table
from lightning_tex.resilience.where import Entry, Track, Where

GROUPS = {0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3]}


def entry(number: int, operation: str = "all_reduce", axis: str = "tensor", shape: tuple[int, ...] = (4,)) -> Entry:
    return Entry(number, operation, axis, list(shape), "float32", "layers.0.mlp", 3)


def where(rank: int, *calls: Entry, waits: bool = True, seconds: float = 9.0) -> Where:
    track = Track("training", calls[-1] if waits else None, seconds, list(calls))
    groups = {"tensor": GROUPS[rank], "world": [0, 1, 2, 3]}
    message = json.loads(json.dumps(Where(3, [track], groups).to_message()))
    return Where.from_message(message)


def named(answers: dict[int, Where | None], states: dict[int, str] | None = None) -> dict[int, str]:
    return dict(stalled_ranks(answers, states or {}))


def test_a_rank_that_does_not_answer() -> None:
    answers = {0: where(0, entry(1)), 1: None, 2: where(2, entry(1)), 3: where(3, entry(1))}
    assert named(answers, {1: "stopped by a signal"}) == {1: "does not answer: its process is stopped by a signal"}


def test_a_rank_that_is_in_no_collective() -> None:
    answers = {rank: where(rank, entry(1), entry(2)) for rank in (0, 2, 3)}
    answers[1] = where(1, entry(1), waits=False)
    assert list(named(answers)) == [1]
    assert "is in no collective for 9.0 s; its last was #1 all_reduce over tensor" in named(answers)[1]


def test_a_rank_that_writes_its_part_of_a_checkpoint_for_too_long() -> None:
    training = [entry(1), entry(2)]
    saving = Entry(1, "gather of an object", "world", None, "", "", 3)
    answers = {}
    for rank in range(4):
        tracks = [Track("training", None, 1.0, training), *([Track("saving", saving, 9.0, [saving])] * (rank != 2))]
        answers[rank] = Where(3, tracks, {"world": [0, 1, 2, 3]})
    assert named(answers) == {2: "has not begun any collective of saving"}


def test_another_shape_in_a_group() -> None:
    answers = {rank: where(rank, entry(1), entry(2, axis="world")) for rank in range(4)}
    answers[2] = where(2, entry(1), entry(2, axis="world", shape=(5,)))
    assert list(named(answers)) == [2]
    assert "[5] in layers.0.mlp where others are in #2 all_reduce over world of float32 [4]" in named(answers)[2]


def test_shapes_may_differ_over_groups_and_in_an_exchange() -> None:
    answers = {
        rank: where(rank, entry(1, shape=(4 + rank // 2,)), entry(2, "all_to_all", "world")) for rank in range(4)
    }
    answers[3] = where(3, entry(1, shape=(5,)), entry(2, "all_to_all", "world", (7,)))
    assert named(answers) == {}


def test_a_collective_left_out() -> None:
    others = (entry(1), entry(2, "all_gather"), entry(3, "reduce_scatter"), entry(4))
    answers = {rank: where(rank, *others) for rank in range(4)}
    answers[3] = where(3, entry(1), entry(2, "reduce_scatter"), entry(3))
    assert list(named(answers)) == [3]
    assert named(answers)[3].startswith("has left out #2 all_gather over tensor")


def test_two_ranks_of_two_that_differ_are_both_named() -> None:
    answers = {0: where(0, entry(1)), 1: where(1, entry(1, "all_gather"))}
    assert list(named(answers)) == [0, 1]


def test_a_rank_that_others_wait_for_in_a_collective_of_the_users() -> None:
    answers = {rank: where(rank, entry(1), waits=False) for rank in range(4)}
    assert named(answers) == {}
    assert [rank for rank, _ in stalled_ranks(answers, {}, timed_out={0, 1, 3})] == [2]


def test_the_table_marks_the_stalled() -> None:
    answers = {0: where(0, entry(7)), 1: None}
    lines = table(answers, {0: "a", 1: "b"}, stalled_ranks(answers, {})).splitlines()
    assert " ".join(lines[1].split()) == "0 a 3 #7 all_reduce over tensor of float32 [4] in layers.0.mlp 9.0 s waits"
    assert lines[2].split() == ["->", "1", "b", "?", "?"]
