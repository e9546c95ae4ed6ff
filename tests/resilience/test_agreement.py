"""Comparisons over ranks through a store: what differs is named, and who does not come."""

from __future__ import annotations

from datetime import timedelta
from enum import Enum
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.stopwatch import Elapsed, Stopwatch

from lightning_tex.errors import UserRuntimeError
from lightning_tex.resilience.agreement import Agreement, Comparison, rank_list
from lightning_tex.resilience.facts import describe, public
from lightning_tex.testing.ranks import run_ranks


def over_all(seconds: float = 30) -> Agreement:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    store = dist.distributed_c10d._get_default_store()
    return Agreement(store, dist.get_rank(), range(dist.get_world_size()), timedelta(seconds=seconds), "test")


def comparison(occasion: str = "here", advised: dict[str, str] | None = None, **required: str) -> Comparison:
    return Comparison(occasion, required, "ranks do not agree", "Do.", advised or {})


def said(ranks: Agreement, *arguments: Any, **facts: Any) -> str | None:
    try:
        return ranks.require(comparison(*arguments, **facts))
    except UserRuntimeError as error:
        return f"error: {error}"


def compare_some() -> list[str | None]:
    ranks, rank = over_all(), dist.get_rank()
    many = {f"x{n}": str(rank == 0) for n in range(11)}
    return [
        said(ranks, same="1"),
        said(ranks, same="1", other="2" if rank == 2 else "1"),
        said(ranks, **({"only": "1"} if rank in (1, 2) else {})),
        said(ranks, everywhere=str(rank)),
        said(ranks, long="x" * (1000 + rank // 3)),
        said(ranks, **many),
        said(ranks, "there" if rank == 1 else "here", other=str(rank)),
        said(ranks, "here", {"told": str(rank // 3)}, same="1"),
        said(ranks, same="1"),
    ]


GROUPS = ((0, 2), (1, 3)), ((0, 1, 2, 3),), ((0, 1), (2, 3))


def own(groups: tuple[tuple[int, ...], ...], rank: int) -> tuple[int, ...]:
    return next(ranks for ranks in groups if rank in ranks)


def compare_in_other_groups() -> list[str | None]:
    """As fits of one process do whose layouts are not the same."""
    over_all()
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    found = []
    for groups in GROUPS:
        agreement = Agreement(store, rank, own(groups, rank), timedelta(seconds=10), "test")
        found += [said(agreement, same="1"), said(agreement, other=str(rank))]
    return found


def test_groups_with_a_rank_in_common_compare_one_after_the_other() -> None:
    for rank, found in enumerate(run_ranks(4, compare_in_other_groups)):
        for groups, alike, different in zip(GROUPS, found[::2], found[1::2], strict=True):
            told = " and ".join(f"{one} on rank {one}" for one in reversed(own(groups, rank)))
            assert (alike, different) == (None, f"error: ranks do not agree: other is {told}. Do.")


def test_what_differs_is_named_with_ranks_and_values_on_all_of_them() -> None:
    shown = "x" * 78 + ".."
    expected = [
        None,
        "error: ranks do not agree: other is 2 on rank 2 and 1 on ranks 0-1, 3. Do.",
        "error: ranks do not agree: only is 1 on ranks 1-2 and not there on ranks 0, 3. Do.",
        "error: ranks do not agree: everywhere is 3 on rank 3 and 2 on rank 2 and 1 on rank 1 and 0 on rank 0. Do.",
        f"error: ranks do not agree: long is {shown} on rank 3 and {shown} on ranks 0-2. Do.",
        "error: ranks do not agree: "
        + "; ".join(f"x{n} is True on rank 0 and False on ranks 1-3" for n in range(8))
        + "; and 3 more. Do.",
        "error: ranks are not in the same place: it is there on rank 1 and here on ranks 0, 2-3. Every rank must run "
        "the same script, call the same methods of its Trainer and log the same names",
        "told is 1 on rank 3 and 0 on ranks 0-2",
        None,
    ]
    for texts in run_ranks(4, compare_some):
        assert texts == expected


def wait_for_one(absent: int) -> tuple[str | None, Elapsed]:
    ranks, rank, store = over_all(seconds=1), dist.get_rank(), dist.distributed_c10d._get_default_store()
    others = [other for other in range(dist.get_world_size()) if other != absent]
    dist.barrier()  # the others come at once
    watch, text = Stopwatch(), None
    if rank == absent:
        store.wait([f"told/{other}" for other in others], timedelta(seconds=100))
    else:
        text = said(ranks, "the start")
        store.set(f"told/{rank}", "")
    return text, watch.elapsed()


@pytest.mark.parametrize("absent", [2, pytest.param(0, marks=pytest.mark.full)])
def test_a_rank_that_does_not_come_is_named_by_the_others(absent: int) -> None:
    expected = f"error: rank {absent} has not come to the start within 1 s, where the other ranks wait"
    for rank, (text, took) in enumerate(run_ranks(3, wait_for_one, absent)):
        assert text == (None if rank == absent else expected)
        assert took.is_within(7), took


def test_ranks_in_words() -> None:
    assert rank_list([3]) == "rank 3"
    assert rank_list([7, 0, 1, 2, 5, 6]) == "ranks 0-2, 5-7"
    assert rank_list([0, 2]) == "ranks 0, 2"


class Colour(Enum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "None"),
        (0.1, "0.1"),
        ("a", "'a'"),
        (torch.float32, "torch.float32"),
        (Colour.RED, "Colour.RED"),
        (timedelta(seconds=3), "0:00:03"),
        (torch.nn.Linear, "torch.nn.modules.linear.Linear"),
        (torch.tensor(0.5), "0.5"),
        ({torch.nn.Linear, Colour}, "{test_agreement.Colour, torch.nn.modules.linear.Linear}"),
        ({"a": (1, [2])}, "{('a', (1, (2)))}"),
        (torch.ones(2), None),
        (object(), None),
        ([object()], None),
        (list(range(1000)), None),
    ],
)
def test_plain_values_in_words(value: object, words: str | None) -> None:
    text = describe(value)
    assert text == words or (words and text == words.replace("test_agreement", __name__))


def test_public_values_of_an_object() -> None:
    assert public(torch.nn.Dropout(0.2), "a.") == {"a.training": "True", "a.p": "0.2", "a.inplace": "False"}
