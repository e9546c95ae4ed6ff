"""Collectives through memory that ranks of one host share, against torch's own; ranks that go, stall or disagree."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from lightning_tex.parallel import shared_memory as memory
from lightning_tex.parallel import transport
from lightning_tex.parallel.errors import is_consequence
from lightning_tex.testing.ranks import RanksFailed, run_ranks

WIDTH = 3


@pytest.fixture(autouse=True)
def _asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(memory.SETTING, "1")


def joined(timeout: float = 60.0) -> dist.ProcessGroup:
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    group = dist.group.WORLD
    assert group is not None
    return group


def by_torch(x):
    gathered = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, x)
    return torch.stack(gathered)


def as_torch_does():
    """Every collective of several dtypes and lengths, 0 among them; of tensors that are not contiguous, too."""
    group = joined()
    rank, size = dist.get_rank(), dist.get_world_size()
    assert memory.shared_memory(group) is not None
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8):
        for rows in (0, 1, 7, 30_001):
            x = (torch.randn(WIDTH, rows, generator=torch.Generator().manual_seed(rank)) * 9).to(dtype).t()
            every = by_torch(x.contiguous())
            near = {"rtol": 3e-2 if dtype == torch.bfloat16 else 1e-5, "atol": 0.5 if dtype == torch.bfloat16 else 1e-4}
            for op, expected in (("sum", every.sum(0, dtype=dtype)), ("max", every.amax(0)), ("min", every.amin(0))):
                y = x.clone(memory_format=torch.preserve_format)
                transport.all_reduce(y, group, op)
                torch.testing.assert_close(y, expected, **near)
                assert all(torch.equal(y, others) for others in by_torch(y.contiguous()))  # to the bit
            out = x.new_empty(size * rows, WIDTH)
            transport.all_gather_single(out, x, group)
            assert torch.equal(out, every.flatten(0, 1))
            flat, part = every.flatten(0, 1).clone(), x.new_empty(rows, WIDTH)
            transport.reduce_scatter_single(part, flat, group)
            torch.testing.assert_close(part, (every[rank] * size).to(dtype), **near)
            own = flat[rank * rows : (rank + 1) * rows]  # in its place
            transport.reduce_scatter_single(own, flat, group)
            assert torch.equal(own, part)
            sent = [(rank + 2 * to) % 3 * rows // 2 for to in range(size)]
            received = [(sender + 2 * rank) % 3 * rows // 2 for sender in range(size)]
            x = torch.arange(rank * 1000, rank * 1000 + sum(sent)).to(dtype)[:, None].expand(-1, 2)
            out, expected = x.new_empty(sum(received), 2), x.new_empty(sum(received), 2)
            transport.all_to_all_single(out, x, received, sent, group)
            dist.all_to_all_single(expected, x.contiguous(), received, sent)
            assert torch.equal(out, expected)


@pytest.mark.parametrize("size", [2, 3])
def test_it_is_what_torch_gives(size):
    run_ranks(size, as_torch_does)


def many_under_way():
    """Begun one after the other, waited for in another order on each rank, more than once round the memory."""
    group = joined()
    rank = dist.get_rank()
    shared = memory.shared_memory(group)
    for turn in range(6):
        given = [torch.full((100_000 + 1000 * i,), float(10 * turn + i + rank)) for i in range(5)]
        under_way = [(x, transport.all_reduce(x, group, async_op=True)) for x in given]
        abandoned = transport.all_reduce(torch.ones(50_000), group, async_op=True)
        for _, started in reversed(under_way) if rank else under_way:
            started.wait()
        del abandoned, started
        for i, (x, _) in enumerate(under_way):
            assert torch.equal(x, torch.full_like(x, 2.0 * (10 * turn + i) + 1)), (turn, i)
        del under_way
    return len(shared._own._bytes)


def test_messages_may_be_waited_for_in_any_order_and_their_memory_is_used_again():
    one_turn = 4 * (5 * 102_000 + 50_000)
    assert all(one_turn < size < 3 * one_turn for size in run_ranks(2, many_under_way))


def leaves_versions_alone():
    group = joined()
    x = torch.ones(4, requires_grad=True)
    version = x._version
    transport.all_reduce(x, group)
    return x._version == version and x.tolist() == [2.0] * 4 and x.grad_fn is None


def test_autograd_sees_nothing_of_it():
    assert all(run_ranks(2, leaves_versions_alone))


def one_dies():
    group = joined()
    transport.all_reduce(torch.ones(2), group)
    if dist.get_rank() == 1:
        os._exit(3)
    begun = time.monotonic()
    try:
        transport.all_reduce(torch.ones(2), group)
        transport.all_reduce(torch.ones(2), group)
    except RuntimeError as error:
        return str(error), is_consequence(error), time.monotonic() - begun
    return None


def test_who_waits_for_a_rank_that_died_hears_of_it():
    with pytest.raises(RanksFailed) as failed:
        run_ranks(2, one_dies)
    message, consequence, seconds = failed.value.outcomes[0]
    assert "another rank has gone: connection closed by peer, rank 1" in message
    assert consequence and seconds < 30


def one_stalls():
    group = joined(timeout=0.5)
    transport.all_reduce(torch.ones(2), group)
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match=r"timed out after 0.5 s in a collective, waiting for rank 1"):
            transport.all_reduce(torch.ones(2), group)
    else:
        time.sleep(1.0)


def test_a_rank_that_does_not_come_is_waited_for_as_long_as_the_group_says():
    run_ranks(2, one_stalls)


def disagree():
    group = joined()
    with pytest.raises(RuntimeError, match=r"sent \d+ bytes where \d+ were expected .* different collectives"):
        transport.all_reduce(torch.ones(2 + dist.get_rank()), group)


def test_ranks_that_disagree_are_told_by_how_much():
    run_ranks(2, disagree)


def without(variable):
    os.environ.update(variable)
    group = joined()
    x = torch.ones(3)
    transport.all_reduce(x, group)
    return memory.shared_memory(group) is None and x.tolist() == [2.0] * 3


def elsewhere():
    """As if the second rank were on another host."""
    if os.environ["RANK"] == "1":
        memory._host = lambda: 1
    return without({})


@pytest.mark.parametrize(
    ("function", "arguments", "detail"),
    [(without, ({memory.SETTING: ""},), False), (without, ({},), True), (elsewhere, (), False)],
    ids=["not asked for", "torch compares", "two hosts"],
)
def test_else_it_is_torchs(function, arguments, detail):
    before = len(os.listdir("/proc/self/fd"))
    assert all(run_ranks(2, function, *arguments, detail=detail))
    assert len(os.listdir("/proc/self/fd")) == before
