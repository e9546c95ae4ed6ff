"""Votes by connections to the first rank: what they give, who is let in, and what happens when a rank is gone."""

from __future__ import annotations

import json
import socket
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from lightning_tex.parallel.errors import UserRuntimeError, is_consequence
from lightning_tex.parallel.topology import Axis
from lightning_tex.resilience import star
from lightning_tex.resilience.vote import Highest, Vote
from lightning_tex.testing.ranks import run_ranks

WORLD = 3


def joined(stranger: bool = False) -> star.Star | None:
    dist.init_process_group("gloo")
    if stranger and dist.get_rank() == 1:
        store = dist.PrefixStore("lightning_tex/star/1", dist.distributed_c10d._get_default_store())
        place = json.loads(store.get("place"))
        with socket.create_connection(("127.0.0.1", place["port"])) as connection:
            connection.sendall(b"x" * len(place["token"]))
            assert connection.recv(1) == b"", "who does not know the token is not let in"
    return star.join_star("127.0.0.1", one_host=True, timeout=timedelta(seconds=30))


def votes() -> dict[str, Any]:
    found, rank = joined(stranger=True), dist.get_rank()
    assert found is not None and star.join_star("", True, timedelta()) is found, "once for a process group"
    host = Axis("world", WORLD, rank, tuple(range(WORLD)), dist.group.WORLD)
    numbers = [(rank, 2 - rank), (0, 7 * (rank == 1)), (5,)]
    return {
        "plain": found.highest([-rank - 1, 2**62 - rank]),
        "star": [Vote(host, found).highest(*some) for some in numbers],
        "gloo": [Vote(host, None).highest(*some) for some in numbers],
    }


def test_votes_are_those_of_a_collective() -> None:
    for found in run_ranks(WORLD, votes):
        assert found["plain"] == [-1, 2**62]
        assert found["star"] == found["gloo"]
        assert found["star"] == [[Highest(2, 2), Highest(2, 0)], [Highest(0, 2), Highest(7, 1)], [Highest(5, 2)]]


def votes_without_one(gone: int) -> str | None:
    found = joined()
    assert found is not None
    if dist.get_rank() == gone:
        found.close()
        return None
    with pytest.raises(UserRuntimeError) as raised:
        found.highest([0])
    assert is_consequence(raised.value)
    found.close()  # as the end of a process does
    return str(raised.value)


@pytest.mark.parametrize("gone", [0, 1])
def test_a_rank_that_is_gone_ends_the_others_as_a_consequence(gone: int) -> None:
    for rank, said in enumerate(run_ranks(WORLD, votes_without_one, gone)):
        assert (said is None) == (rank == gone) and (said is None or "another rank has gone: " in said)


def joined_by_some() -> bool:
    connected = star.connected

    def refused(host: str, port: int) -> Any:
        if dist.get_rank() == 2:
            raise ConnectionRefusedError
        return connected(host, port)

    star.connected = refused
    return joined() is None and star.current_star() is None


def test_where_one_rank_does_not_reach_the_first_none_votes_so() -> None:
    assert run_ranks(WORLD, joined_by_some) == [True] * WORLD


def test_an_error_that_has_come_from_one_that_it_led_to_has_an_end() -> None:
    first, then = ValueError("first"), KeyError("then")
    first.__context__, then.__cause__ = then, first
    assert not is_consequence(then)
    first.__cause__ = UserRuntimeError("another rank has gone")
    assert is_consequence(then)
