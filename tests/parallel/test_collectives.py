"""Each collective against its formula, forward and backward, on 4 ranks.

``numbers(rank, *shape)`` gives every rank every other rank's input, so that each computes what it should get.
"""

from functools import partial

import torch
import torch.distributed as dist
from helpers.topologies import join

from lightning_tex.parallel import collectives as c
from lightning_tex.parallel import in_place_collectives as in_place
from lightning_tex.parallel.all_to_all import all_to_all, start_all_to_all
from lightning_tex.parallel.topology import Axis
from lightning_tex.testing.ranks import run_ranks

# An uneven all-to-all: TRAFFIC[i][j] rows go from rank i to rank j. Rank 2 sends nothing, rank 1 receives nothing.
TRAFFIC = [[1, 0, 3, 2], [0, 0, 5, 1], [0, 0, 0, 0], [4, 0, 1, 0]]
UNEVEN = [[3, 0, 2, 1], [0, 0, 0, 5], [1, 2, 1, 1], [0, 0, 0, 0], [2, 2, 2, 2]]


def numbers(rank, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + rank), dtype=torch.float64).to(dtype)


def whole_axis():
    return join().data  # all 4 ranks


def axes():
    """All four ranks; two neighbours; two that are not neighbours."""
    pairs = join(tensor=2)
    return [whole_axis(), pairs.tensor, pairs.data]


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-14)


def run_backward(operation, x, grad):
    x = x.clone().requires_grad_()
    y = operation(x)
    y.backward(grad)
    return y.detach(), x.grad


# --- plain


def plain():
    for axis in axes():
        members = axis.ranks
        x = numbers(dist.get_rank(), 3, 4, 2)
        kept = x.clone()
        xs = torch.stack([numbers(r, 3, 4, 2) for r in members])
        same(c.all_reduce(x, axis), xs.sum(0))
        same(c.all_reduce(x, axis, "max"), xs.amax(0))
        same(c.all_reduce(x, axis, "min"), xs.amin(0))
        same(c.all_reduce(x.transpose(0, 2), axis), xs.sum(0).transpose(0, 2))
        for dim in (0, 1, -1):
            same(c.all_gather(x, dim, axis), torch.cat(list(xs), dim))
        same(c.reduce_scatter(x, 1, axis), xs.sum(0).chunk(axis.size, 1)[axis.rank])
        same(c.reduce_scatter(x.transpose(0, 1), 0, axis), xs.sum(0).transpose(0, 1).chunk(axis.size)[axis.rank])
        same(x, kept)
        same(c.broadcast(x.clone(), axis), xs[0])
        same(c.broadcast(x.transpose(0, 1), axis), xs[0].transpose(0, 1))

        buffer = numbers(dist.get_rank(), 8)
        buffers = torch.stack([numbers(r, 8) for r in members])
        part = 8 // axis.size
        own = slice(axis.rank * part, (axis.rank + 1) * part)
        same(in_place.own_part(buffer, axis), buffers[axis.rank, own])
        gathered = buffer.clone()
        in_place.gather_in_place(gathered, axis).wait()
        same(gathered, torch.cat([buffers[i, i * part : (i + 1) * part] for i in range(axis.size)]))
        summed = buffer.clone()
        in_place.reduce_scatter_in_place(summed, axis).wait()
        same(summed[own], buffers.sum(0)[own])
    low = numbers(dist.get_rank(), 6, dtype=torch.bfloat16)
    summed = c.all_reduce(low, whole_axis())
    assert summed.dtype == torch.bfloat16
    expected = sum(numbers(r, 6, dtype=torch.bfloat16).double() for r in range(4))
    torch.testing.assert_close(summed.double(), expected, rtol=2e-2, atol=2e-2)


def test_plain_collectives():
    run_ranks(4, plain, detail=True)


# --- with a backward


def sharded_product(x, weight, axis):
    own = slice(4 * axis.rank, 4 * axis.rank + 4)
    return c.reduce(c.enter(x, axis)[:, own] @ weight[own], axis)


def enter_and_reduce():
    for axis in axes():
        me = dist.get_rank()
        xs = torch.stack([numbers(r, 2, 5) for r in axis.ranks])
        grads = torch.stack([numbers(10 + r, 2, 5) for r in axis.ranks])
        x, grad = numbers(me, 2, 5), numbers(10 + me, 2, 5)

        y, dx = run_backward(partial(c.enter, axis=axis), x, grad)
        same(y, x)
        same(dx, grads.sum(0))

        y, dx = run_backward(partial(c.reduce, axis=axis), x, grad)
        same(y, xs.sum(0))
        same(dx, grad)

        y, dx = run_backward(partial(c.sum_over, axis=axis), x, grad)
        same(y, xs.sum(0))
        same(dx, grad * axis.size)

        # Between them a product sharded over the axis is the whole product, for operands that all ranks hold alike.
        inner = 4 * axis.size
        shared, weight, upstream = numbers(50, 3, inner), numbers(51, inner, 6), numbers(52, 3, 6)
        y, dx = run_backward(partial(sharded_product, weight=weight, axis=axis), shared, upstream)
        same(y, shared @ weight)
        same(dx, upstream @ weight.T)


def test_enter_reduce_and_sum_over():
    run_ranks(4, enter_and_reduce, detail=True)


def averaged_loss():
    # What sum_over is for: a loss of a data-wide sum, whose gradients are then averaged over data.
    axis = whole_axis()
    weight = numbers(7, 5).requires_grad_()
    total = c.sum_over((numbers(axis.rank, 3, 5) @ weight).square().sum(), axis)
    total.sqrt().backward()
    averaged = c.all_reduce(weight.grad, axis) / axis.size

    alone = numbers(7, 5).requires_grad_()
    everything = torch.cat([numbers(r, 3, 5) for r in range(4)])
    (everything @ alone).square().sum().sqrt().backward()
    same(total.detach(), (everything @ alone).square().sum().detach())
    same(averaged, alone.grad)


def test_gradient_of_a_data_wide_sum_averages_to_the_single_process_gradient():
    run_ranks(4, averaged_loss, detail=True)


def gather_and_split():
    axis = whole_axis()
    me = axis.rank
    for sizes in [*UNEVEN, None]:
        each = sizes or [2] * 4
        for dim, shape in ((0, lambda n: (n, 3)), (1, lambda n: (2, n, 3)), (-1, lambda n: (2, n))):
            parts = [numbers(r, *shape(n)) for r, n in enumerate(each)]
            whole = torch.cat(parts, dim)
            upstream = numbers(30, *whole.shape)
            # The whole is treated alike by all ranks, so the gradient that reaches it is alike, too.
            y, dx = run_backward(lambda t, d=dim, s=sizes: c.gather(t, d, axis, s), parts[me], upstream)
            same(y, whole)
            same(dx, upstream.split(each, dim)[me])

            y, dx = run_backward(
                lambda t, d=dim, s=sizes: c.split(t, d, axis, s), whole, upstream.split(each, dim)[me].contiguous()
            )
            same(y, parts[me])
            assert y.is_contiguous()
            same(dx, upstream)


def test_gather_and_split_even_uneven_and_empty():
    run_ranks(4, gather_and_split, detail=True)


def rows_to_ranks():
    axis = whole_axis()
    me = axis.rank
    for traffic in (TRAFFIC, [[0] * 4] * 4, None):
        rows = traffic or [[2] * 4] * 4
        leave, arrive = rows[me], [rows[i][me] for i in range(4)]
        sent = [numbers(r, sum(rows[r]), 3) for r in range(4)]
        expected = torch.cat([sent[i].split(rows[i])[me] for i in range(4)])
        grads = [numbers(40 + r, sum(rows[i][r] for i in range(4)), 3) for r in range(4)]
        there, back_again = ((arrive, leave), (leave, arrive)) if traffic else ((None, None), (None, None))
        under_way = start_all_to_all(sent[me], axis, *there), start_all_to_all(grads[me], axis, *back_again)
        y, dx = all_to_all(sent[me], axis, *there), all_to_all(grads[me], axis, *back_again)
        assert all(torch.equal(a.wait(), b) for a, b in zip(under_way, (y, dx), strict=True))
        same(y, expected)
        back = [grads[j].split([rows[i][j] for i in range(4)])[me] for j in range(4)]
        same(dx, torch.cat(back))
        # A permutation of rows over the ranks: <A x, y> = <x, A^T y> over the whole distributed vector.
        left = c.all_reduce((y * grads[me]).sum(), axis)
        right = c.all_reduce((sent[me] * dx).sum(), axis)
        same(left, right)
    strided = numbers(me, 3, 8).T  # [8, 3], not contiguous
    same(all_to_all(strided, axis), torch.cat([numbers(i, 3, 8).T.chunk(4)[me] for i in range(4)]))


def test_all_to_all_even_uneven_and_empty_and_its_transpose():
    run_ranks(4, rows_to_ranks, detail=True)


def test_on_an_axis_of_size_one_all_are_the_identity():
    axis = Axis("tensor")
    x = numbers(0, 4, 2)
    for function in (c.enter, c.reduce, c.sum_over, c.all_reduce, c.broadcast, all_to_all):
        assert function(x, axis) is x
    for function in (c.gather, c.split, c.all_gather, c.reduce_scatter):
        assert function(x, 0, axis) is x
    buffer = x.flatten().clone()
    in_place.gather_in_place(buffer, axis).wait()
    in_place.reduce_scatter_in_place(buffer, axis).wait()
    assert torch.equal(buffer, x.flatten())
    assert torch.equal(in_place.own_part(buffer, axis), buffer)
