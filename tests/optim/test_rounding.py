"""Stochastic rounding: right on average, by random bits of the whole tensor, whatever part of it a rank has."""

import torch
from helpers.optimizer_alone import tiled
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_tex.optim.flat import Entry
from lightning_tex.optim.rounding import Rounding, RoundingSeed, global_index, round_stochastically, table_of
from lightning_tex.parallel.box import Box
from lightning_tex.parallel.extent import Extent
from lightning_tex.parallel.sharding import ParameterSharding
from lightning_tex.parallel.topology import Axis, Topology


def test_stochastic_rounding_is_right_on_average_and_gives_neighbours():
    values = torch.tensor([1.0, 1.001, -1.001, 3e-5, -7.77, 0.0]).repeat(20000)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 1 << 16, values.shape, generator=generator, dtype=torch.int32)
    out = torch.empty_like(values, dtype=torch.bfloat16)
    round_stochastically(values.clone(), bits, out)
    rounded, exact = out.double().view(-1, 6), values.double().view(-1, 6)[0]
    spacing = 2.0 ** (exact.abs().clamp(min=1e-30).log2().floor() - 7)
    assert ((rounded - exact).abs() < spacing).all()
    assert ((rounded.mean(0) - exact).abs() <= 0.02 * spacing).all()
    assert (rounded[:, 0] == 1.0).all() and (rounded[:, 5] == 0.0).all()


def test_updates_too_small_to_see_add_up():
    model = nn.Linear(64, 64, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = tiled(model, torch.optim.SGD(model.parameters(), lr=1e-4), optimizer_state_format="stochastic")
    for _ in range(100):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    assert abs(float(model.weight.detach().double().mean()) - 0.99) < 5e-4
    assert model.weight.unique().numel() > 1


def bits_of(box, name="weight", seed=1, step=0, key="master"):
    stored = nn.Parameter(torch.zeros(box.stored, dtype=torch.bfloat16))
    placed = ParameterSharding.of(name, box, {}, Topology.single())
    entry = Entry(stored, placed, Extent.run(0, stored.numel()))
    rounding = Rounding(RoundingSeed(seed, step), [entry], 0, stored.device)
    return rounding.bits(slice(0, stored.numel()), key).view(box.stored)


@st.composite
def boxes(draw):
    whole = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    dims = draw(st.lists(st.integers(0, len(whole) - 1), unique=True))
    sizes = [draw(st.integers(1, 3)) for _ in dims]
    return whole, [
        (Axis("a", size, draw(st.integers(0, size - 1))), dim) for size, dim in zip(sizes, dims, strict=True)
    ]


@given(boxes())
def test_global_indices_are_those_of_the_whole_tensor(case):
    whole, shard_axes = case
    box = Box.of(whole, shard_axes)
    count = torch.Size(box.stored).numel()
    table = table_of(box, torch.device("cpu"))
    index = global_index(box, 0, count, table).view(box.stored)
    expected = torch.arange(torch.Size(whole).numel()).view(whole)
    assert torch.equal(box.unpadded(index), expected[box.extent.slices])
    assert torch.equal(global_index(box, count // 2, count, table), index.flatten()[count // 2 :])


def test_random_bits_are_even_and_change_with_everything_they_depend_on():
    box = Box.of((256, 256), [])
    bits = bits_of(box)
    assert bits.min() >= 0 and bits.max() < 1 << 16
    ones = torch.stack([(bits >> i & 1).double().mean() for i in range(16)])
    assert ((ones - 0.5).abs() < 0.01).all()
    neighbours = (bits[:, 1:] ^ bits[:, :-1]).double()
    assert 0.45 < float(neighbours.mean() / (1 << 16)) < 0.55
    for other in (bits_of(box, seed=2), bits_of(box, step=1), bits_of(box, name="bias"), bits_of(box, key="exp_avg")):
        assert float((other != bits).double().mean()) > 0.99
    part = Box.of((256, 256), [(Axis("tensor", 2, 1), 1)])
    assert torch.equal(bits_of(part), bits[:, 128:])
