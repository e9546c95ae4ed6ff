"""States in eight bits: near everywhere, exact at the top of a block, and never stuck."""

import torch
from torch import nn

from lightning_tex.optim.flat import Entry
from lightning_tex.optim.moments import BLOCK, Int8Moments
from lightning_tex.optim.rounding import Rounding, RoundingSeed
from lightning_tex.parallel.box import Box
from lightning_tex.parallel.extent import Extent
from lightning_tex.parallel.sharding import ParameterSharding
from lightning_tex.parallel.topology import Topology


def moments(count, nonnegative=frozenset({"v"})):
    own = torch.zeros(count, dtype=torch.bfloat16)
    kept = Int8Moments(own, nonnegative, Rounding(RoundingSeed(), [], 0, own.device))
    for key in ("m", "v"):
        kept.make(key)
    return kept


def test_eight_bit_states_are_near_and_what_was_kept_once_is_kept_exactly():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(BLOCK * 50, generator=generator) * torch.logspace(-6, 3, 50).repeat_interleave(BLOCK)
    kept, every = moments(len(values)), slice(0, len(values))
    for key, exact in (("m", values), ("v", values.square())):
        kept.write(key, every, exact.clone(), exact=True)
        read = kept.read(key, every)
        largest = exact.view(-1, BLOCK).abs().amax(1, keepdim=True)
        relative = ((read - exact).abs() / exact.abs()).view(-1, BLOCK)
        near_top = exact.view(-1, BLOCK).abs() > 1e-3 * largest
        assert relative[near_top].max() < 0.1 and relative[near_top].mean() < 0.03
        assert torch.equal(read.view(-1, BLOCK).abs().amax(1), largest[:, 0]), "a block's largest value is exact"
        kept.write(key, every, read.clone(), exact=True)
        assert torch.equal(kept.read(key, every), read)


def test_a_square_above_zero_never_becomes_zero_and_zero_stays():
    values = torch.full((BLOCK,), 1e-30)
    values[0], values[1] = 1.0, 0.0
    kept = moments(BLOCK)
    kept.write("v", slice(0, BLOCK), values.clone())
    read = kept.read("v", slice(0, BLOCK))
    assert read[0] == 1 and read[1] == 0 and (read[2:] > 0).all()


def test_the_largest_value_of_every_block_is_kept_exactly():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2000, BLOCK, generator=generator) * 10 ** torch.linspace(-36, 36, 2000)[:, None]
    for key, whole in (("m", values), ("v", values.abs())):
        kept = moments(values.numel())
        kept.write(key, slice(0, values.numel()), whole.flatten().clone())
        read = kept.read(key, slice(0, values.numel())).view(-1, BLOCK)
        at = whole.abs().argmax(1, keepdim=True)
        assert torch.equal(read.gather(1, at), whole.gather(1, at)), key


def test_a_slow_average_is_not_stuck_at_a_code():
    count, steps = BLOCK * 8, 3000
    weight = nn.Parameter(torch.zeros(count, dtype=torch.bfloat16))
    placed = ParameterSharding.of("weight", Box.of(weight.shape, []), {}, Topology.single())
    entry = Entry(weight, placed, Extent.run(0, count))
    every, rounding = slice(0, count), Rounding(RoundingSeed(), [entry], 0, weight.device)
    kept = Int8Moments(weight.detach(), frozenset({"v"}), rounding)
    kept.make("v")
    start = torch.full((count,), 0.2)
    start.view(-1, BLOCK)[:, 0] = 1.0
    kept.write("v", every, start, exact=True)
    for step in range(steps):
        rounding.rounding_seed.step = step
        values = kept.read("v", every)
        values.view(-1, BLOCK)[:, 1:].lerp_(torch.tensor(0.25), 1e-3)
        kept.write("v", every, values)
    rest = kept.read("v", every).view(-1, BLOCK)[:, 1:]
    assert abs(float(rest.mean()) - (0.25 - 0.05 * 0.999**steps)) < 0.005
