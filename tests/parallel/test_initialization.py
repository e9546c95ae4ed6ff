"""Values drawn for a shard are those that the whole tensor has there, on every layout."""

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import case
from helpers.sharded_modules import LAYOUTS, Everything, box_of, coordinates
from helpers.topologies import join
from torch import nn

from lightning_tex.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, VocabParallelHead
from lightning_tex.parallel import initialization
from lightning_tex.parallel.hashing import stable_hash
from lightning_tex.parallel.sharding import (
    TexModule,
    parameter_shardings,
    shard_module,
)
from lightning_tex.parallel.topology import Topology
from lightning_tex.testing.ranks import run_ranks

DRAWS = [
    lambda p, box: initialization.init_normal_(p, 0.3, box),
    lambda p, box: initialization.init_uniform_(p, 0.3, box),
]


@pytest.mark.parametrize("draw", DRAWS, ids=["normal", "uniform"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "shard_sizes"),
    [
        ((61, 8), [(0, 4)]),
        ((5, 3), [(0, 4)]),
        ((12, 20), [(1, 4)]),
        ((7,), [(0, 2)]),
        ((8, 6, 10), [(0, 4), (2, 2)]),
        ((8, 6, 10), [(0, 2), (1, 3)]),
        ((1500, 1000), [(0, 2)]),  # more than one slab whole, one slab in parts
    ],
)
def test_a_part_draws_what_the_whole_has_there(draw, dtype, shape, shard_sizes):
    torch.manual_seed(3)
    whole = torch.empty(shape, dtype=dtype)
    draw(whole, box_of(shape, []))
    assert whole.float().std() > 0
    for ranks in coordinates(shard_sizes):
        box = box_of(shape, [(dim, size, rank) for (dim, size), rank in zip(shard_sizes, ranks, strict=True)])
        part = torch.full(box.stored, float("nan"), dtype=dtype)
        torch.manual_seed(3)
        draw(part, box)
        assert torch.equal(part, box.shard(whole))


def drawn(draw, n, seed=0):
    torch.manual_seed(seed)
    x = torch.empty(n, dtype=torch.float64)
    draw(x, box_of((n,), []))
    return x


def test_normal_draws_look_normal():
    n = 200_000
    x = drawn(lambda p, box: initialization.init_normal_(p, 2.0, box), n) / 2
    within = 5 / n**0.5  # five standard errors
    assert abs(x.mean()) < within
    assert abs(x.var() - 1) < within * 2**0.5
    assert abs((x**3).mean()) < within * 15**0.5
    assert abs((x**4).mean() - 3) < within * 96**0.5
    assert abs((x[1:] * x[:-1]).mean()) < within
    assert abs((x.abs() < 1).double().mean() - 0.6826895) < within / 2
    assert x.unique().numel() == n


def test_uniform_draws_look_uniform():
    n = 200_000
    x = drawn(lambda p, box: initialization.init_uniform_(p, 3.0, box), n) / 3
    within = 5 / n**0.5
    assert x.abs().max() <= 1
    assert x.max() > 0.999 and x.min() < -0.999
    assert abs(x.mean()) < within / 3**0.5
    assert abs(x.var() - 1 / 3) < within * (4 / 45) ** 0.5
    assert abs((x[1:] * x[:-1]).mean()) < within / 3
    assert torch.histc(x, 20, -1, 1).sub(n / 20).abs().max() < 5 * (n / 20) ** 0.5


def test_draws_depend_on_the_seed_and_consume_one_number():
    def normal(p, box):
        initialization.init_normal_(p, 1.0, box)

    assert not torch.equal(drawn(normal, 50, 0), drawn(normal, 50, 1))
    drawn(normal, 50, 0)
    after_small = torch.rand(1)
    drawn(normal, 5000, 0)
    assert torch.equal(after_small, torch.rand(1))
    correlation = (drawn(normal, 20_000, 0) * drawn(normal, 20_000, 1)).mean()
    assert abs(correlation) < 5 / 20_000**0.5


def test_stable_hash_is_the_same_on_every_machine():
    assert stable_hash(0, "a") == 1634810781263791882
    assert stable_hash("1", "2") != stable_hash("12")
    assert 0 <= stable_hash("anything") < 2**62


# --- materialise


class OwnReset(TexModule):
    """A user's layer whose reset draws as if alone."""

    shard_dims = {"weight": {"tensor": 1}}

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 8))
        self.scale = nn.Parameter(torch.empty(2))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.weight)
        nn.init.uniform_(self.scale)


class WithReal(nn.Module):
    """A module with a parameter that has a value already, beside one that has not."""

    def __init__(self):
        super().__init__()
        self.made = nn.Parameter(torch.arange(4.0))
        self.drawn = nn.Parameter(torch.empty(4, device="meta"), requires_grad=False)
        self.register_buffer("table", torch.empty(3, device="meta"))

    def reset_parameters(self):
        for tensor in (self.made, self.drawn, self.table):
            nn.init.constant_(tensor, 7.0)


class Mixed(Everything):
    def __init__(self):
        super().__init__()
        self.own = OwnReset()
        self.normed = nn.LayerNorm(6)


def on_meta(build):
    with torch.device("meta"):
        return build()


def materialise_on_ranks():
    cpu = torch.device("cpu")
    alone = on_meta(Mixed)
    shard_module(alone, Topology.single())
    initialization.materialise(alone, cpu, seed=5)
    wholes = dict(alone.named_parameters())
    never_sharded = on_meta(Mixed)
    initialization.materialise(never_sharded, cpu, seed=5)
    for name, parameter in never_sharded.named_parameters():
        assert torch.equal(parameter, wholes[name]), name
    for layout in LAYOUTS:
        with case(layout):
            topology = join(*layout)
            torch.manual_seed(topology.world.rank)  # must not matter
            state = torch.get_rng_state()
            model = on_meta(Mixed)
            shard_module(model, topology)
            assert all(p.is_meta for p in model.parameters())
            initialization.materialise(model, cpu, seed=5)
            assert torch.equal(torch.get_rng_state(), state)
            assert model.head.weight is model.embedding.weight
            assert model.decoder.head.weight is model.decoder.embedding.weight
            found = parameter_shardings(model, topology)
            assert list(found) == list(wholes)
            for name, parameter in model.named_parameters():
                assert parameter.shape == found[name].box.stored
                assert torch.equal(found[name].gather(parameter.detach()), wholes[name]), (layout, name)
                assert torch.equal(found[name].box.shard(wholes[name].detach()), parameter), "padding is not zero"
    return True


def test_a_meta_model_is_drawn_alike_on_every_layout_bit_for_bit():
    run_ranks(4, materialise_on_ranks)


def test_values_depend_on_seed_and_name():
    def made(seed):
        model = on_meta(lambda: nn.ModuleList(ColumnParallelLinear(16, 16) for _ in range(2)))
        initialization.materialise(model, torch.device("cpu"), seed)
        return model

    first, second = made(0), made(1)
    assert not torch.equal(first[0].weight, first[1].weight)
    assert not torch.equal(first[0].weight, second[0].weight)
    assert torch.equal(first[0].weight, made(0)[0].weight)
    assert first[0].weight.abs().max() <= 1 / 4


def test_materialised_layers_have_the_spread_of_torch_nn():
    model = on_meta(
        lambda: nn.ModuleDict(
            {"linear": RowParallelLinear(64, 300), "embedding": VocabParallelEmbedding(300, 64, std=0.5)}
        )
    )
    initialization.materialise(model, torch.device("cpu"), 0)
    reference = nn.Linear(64, 300)
    for own, theirs in ((model["linear"].weight, reference.weight), (model["linear"].bias, reference.bias)):
        assert own.abs().max() <= 1 / 8
        torch.testing.assert_close(own.std(), theirs.std(), rtol=0.1, atol=0)
    assert abs(model["embedding"].weight.std() - 0.5) < 0.02


def test_what_is_not_on_meta_keeps_its_value():
    model = nn.Sequential(WithReal(), nn.Linear(2, 2))
    weight = model[1].weight.detach().clone()
    initialization.materialise(model, torch.device("cpu"), 0)
    assert torch.equal(model[0].made, torch.arange(4.0))
    assert torch.equal(model[0].drawn, torch.full((4,), 7.0))
    assert not model[0].drawn.requires_grad
    assert torch.equal(model[0].table, torch.full((3,), 7.0))
    assert torch.equal(model[1].weight, weight)


def test_a_tie_with_a_real_parameter_survives():
    embedding, head = VocabParallelEmbedding(11, 4), on_meta(lambda: VocabParallelHead(4, 11))
    head.weight = embedding.weight
    model = nn.ModuleList([head, embedding, on_meta(lambda: nn.Linear(4, 4))])
    weight = embedding.weight.detach().clone()
    initialization.materialise(model, torch.device("cpu"), 0)
    assert model[0].weight is model[1].weight
    assert torch.equal(model[0].weight, weight)


def test_a_module_that_cannot_draw_itself_is_named():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(3))

        def forward(self, x):
            return F.linear(x, self.weight)

    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(on_meta(Scale)))
    with pytest.raises(TypeError, match=r"1\.0 \(Scale\) has parameters or buffers on the meta device but no reset"):
        initialization.materialise(model, torch.device("cpu"), 0)
