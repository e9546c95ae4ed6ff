"""Experts of a module class of one's own, and a dense MLP mixed with the experts: against plain loops, on layouts."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import case
from helpers.ranks import together
from helpers.topologies import join
from helpers.trainers import gathered, quiet
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_tex import LanguageModel, TexMoEStrategy
from lightning_tex.models import DecoderConfig
from lightning_tex.moe import MoE
from lightning_tex.parallel.collectives import all_reduce
from lightning_tex.parallel.device import pretend_device
from lightning_tex.parallel.errors import UserError
from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.sharding import check_shardable, parameter_shardings, shard_module
from lightning_tex.testing import assert_trains_alike
from lightning_tex.testing.ranks import run_ranks

PAGE = Path(__file__).parents[2] / "docs" / "own-expert.md"
DIM, HIDDEN, EXPERTS = 6, 10, 4
# tensor, expert, expert_tensor, of four ranks
LAYOUTS = [(1, 4, 1), (1, 2, 1), (1, 1, 1), (2, 2, 1), (2, 4, 1), (4, 4, 1)]


class Normed(nn.Module):
    """An expert that no stacked MLP is: a norm inside, a bias and a number of its own."""

    def __init__(self, dim: int, hidden_dim: int, slope: float = 0.1) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(dim, hidden_dim), nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, dim)
        self.scale, self.slope = nn.Parameter(torch.ones(())), slope

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.down(F.leaky_relu(self.norm(self.up(x)), self.slope))


class WithBuffer(Normed):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(dim, hidden_dim)
        self.register_buffer("seen", torch.zeros(()))


def build(**options: Any) -> MoE:
    torch.manual_seed(0)
    given = {"top_k": 2, "norm_topk_prob": True, "load_balance_coefficient": 0.0, "expert_module": Normed}
    return MoE(DIM, HIDDEN, EXPERTS, **{**given, **options}).double()


def modules_of(layer: MoE) -> list[Normed]:
    """The experts of a whole layer, as modules of their own."""
    experts = []
    for number in range(layer.num_experts):
        one = Normed(DIM, HIDDEN).double()
        for name, parameter in one.named_parameters():
            parameter.data = getattr(layer.experts, name.replace(".", "_")).data[number].clone()
        experts.append(one)
    return experts


def plain(
    layer: MoE, experts: list[Normed], x: Tensor, capacity: int | None = None, mask: Tensor | None = None
) -> Tensor:
    """One choice after the other."""
    scores = (x @ layer.router.weight.T).softmax(-1)
    best = scores.argsort(dim=-1, descending=True, stable=True)[:, : layer.top_k]
    taken = [0] * layer.num_experts
    rows = list(torch.zeros_like(x).unbind())
    for i in range(layer.top_k):
        for t in range(len(x)):
            e = int(best[t, i])
            if (mask is not None and not mask[t]) or (capacity is not None and taken[e] == capacity):
                continue
            taken[e] += 1
            rows[t] = rows[t] + scores[t, e] / scores[t, best[t]].sum() * experts[e](x[t])
    y = torch.stack(rows)
    if layer.residual is not None:
        c = layer.residual.mix(x).softmax(-1)
        r = layer.residual
        y = c[:, :1] * y + c[:, 1:] * (F.gelu(x @ r.up.weight.T) @ r.down.weight.T)
    return y


@pytest.mark.parametrize(
    "options", [{}, {"capacity_factor": 0.7}, {"residual_hidden_dim": 8}, {"masked": True}], ids=str
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])  # whose code it is, on a CPU
def test_it_is_the_plain_loop_over_modules_forward_and_backward(options: dict[str, Any], device: str) -> None:
    options = dict(options)
    masked = options.pop("masked", False)
    layer = build(**options)
    experts = modules_of(layer)
    x = torch.randn(13, DIM, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(13) % 3 > 0 if masked else None
    factor = options.get("capacity_factor")
    with pretend_device(device):
        y = layer(x, mask)
    expected = plain(layer, experts, x, factor and math.ceil(factor * 2 * 13 / EXPERTS), mask)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(y)
    whole = [p for name, p in layer.named_parameters() if not name.startswith("experts.")]
    own = torch.autograd.grad(y, [x, *whole, *layer.experts.parameters()], upstream)
    d_x, *others = torch.autograd.grad(expected, [x, *whole], upstream, retain_graph=True)
    for found, wanted in zip(own, [d_x, *others], strict=False):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    of_experts = dict(zip(dict(layer.experts.named_parameters()), own[1 + len(whole) :], strict=True))
    each = torch.autograd.grad(expected, [p for e in experts for p in e.parameters()], upstream, materialize_grads=True)
    for place, name in enumerate(name for name, _ in experts[0].named_parameters()):
        wanted = torch.stack(each[place :: len(list(experts[0].parameters()))])
        torch.testing.assert_close(of_experts[name.replace(".", "_")], wanted, rtol=1e-11, atol=1e-12)


def test_an_mlp_is_mixed_with_experts_that_have_biases() -> None:
    torch.manual_seed(0)
    layer = MoE(DIM, HIDDEN, EXPERTS, 2, bias=True, residual_hidden_dim=8, load_balance_coefficient=0.0)
    x = torch.randn(7, DIM)
    c = layer.residual.mix(x).softmax(-1)
    dense = F.gelu(x @ layer.residual.up.weight.T) @ layer.residual.down.weight.T
    mixed, layer.residual = layer(x), None
    torch.testing.assert_close(mixed, c[:, :1] * layer(x) + c[:, 1:] * dense)


def compare(layouts: list[tuple[int, ...]]) -> None:
    for sizes in layouts:
        for options in ({}, {"capacity_factor": 0.7}, {"residual_hidden_dim": 8}):
            for chunks in (1, 2):
                with case(sizes, options, chunks):
                    _compare(join(*sizes, expert_chunks=chunks), options)


def _compare(topology: Any, options: dict[str, Any]) -> None:
    layer, data = build(**options), topology.data
    reference = copy.deepcopy(layer)
    check_shardable(layer, topology.layout)
    shard_module(layer, topology)
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(n, DIM, generator=generator, dtype=torch.float64) for n in [7, 0, 8, 1][: data.size]]
    mine = inputs[data.rank].clone().requires_grad_()
    y = layer(mine)
    y.backward(torch.cos(y.detach() * 0 + 1))
    for rank, x in enumerate(inputs):
        x.requires_grad_()
        expected = reference(x)
        expected.backward(torch.cos(expected.detach() * 0 + 1))
        if rank == data.rank:
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(mine.grad, x.grad, rtol=1e-11, atol=1e-12)
    shardings = parameter_shardings(layer, topology)
    wanted = dict(reference.named_parameters())
    for name, parameter in layer.named_parameters():
        at = shardings[name]
        gradient = at.gather(all_reduce(parameter.grad, at.replicas) / at.divisor)
        expected = torch.zeros_like(wanted[name]) if wanted[name].grad is None else wanted[name].grad / data.size
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_layouts_give_what_one_process_gives() -> None:
    run_ranks(4, compare, LAYOUTS[3:4])


@pytest.mark.full
def test_all_layouts_give_what_one_process_gives() -> None:
    run_ranks(4, compare, LAYOUTS)


SIZES = {"vocab_size": 61, "dim": 16, "num_layers": 2, "num_heads": 4, "hidden_dim": 24, "num_experts": 4, "top_k": 2}
NAMED = {"name": f"{__name__}.Normed", "init_args": {"slope": 0.3}}


def tokens() -> DataLoader:
    ids = torch.randint(61, (32, 9), generator=torch.Generator().manual_seed(0))
    samples = [{"input_ids": row[:-1], "labels": row[1:]} for row in ids]
    return DataLoader(samples, batch_size=8)  # type: ignore[arg-type]


def model(**options: Any) -> LanguageModel:
    return LanguageModel(DecoderConfig(**{**SIZES, "expert_module": Normed, "residual_hidden_dim": 8, **options}))


FOLDED = {"devices": 4, "tensor_parallel_size": 2, "expert_tensor_parallel_size": 1, "expert_parallel_size": 4}


@pytest.mark.parametrize(
    "layout",
    [
        {"devices": 2, "expert_parallel_size": 2, "activation_checkpointing": "communication_aware"},
        pytest.param(
            {**FOLDED, "activation_checkpointing": "communication_aware", "sequence_parallel": True},
            marks=pytest.mark.full,
        ),
        pytest.param({**FOLDED, "activation_checkpointing": "full"}, marks=pytest.mark.full),
        pytest.param({"devices": 2, "expert_parallel_size": 2, "expert_chunks": 2}, marks=pytest.mark.full),
        pytest.param({"devices": 2, "zero_stage": 2}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_it_begins_and_trains_alike(layout: dict[str, Any]) -> None:
    assert_trains_alike(model, tokens(), layouts=[layout], steps=2)


def saved(path: str, **layout: Any) -> dict[str, Tensor]:
    module = model()
    fit = quiet(devices=layout.pop("devices"), strategy=TexMoEStrategy(**layout), max_steps=1)
    fit.fit(module, tokens())
    fit.save_checkpoint(path)
    return gathered(module, fit)


def loaded(path: str, **layout: Any) -> dict[str, Tensor]:
    torch.manual_seed(9)
    module = model()
    fit = quiet(devices=layout.pop("devices"), strategy=TexMoEStrategy(**layout), max_steps=1)
    fit.validate(module, tokens(), ckpt_path=path, verbose=False)
    return gathered(module, fit)


@pytest.mark.full
def test_a_checkpoint_goes_from_layout_to_layout(tmp_path: Path) -> None:
    path, two = str(tmp_path / "own.ckpt"), {"devices": 2, "expert_parallel_size": 2}
    layout = FOLDED | {"expert_parallel_size": 2}

    def write() -> dict[str, Tensor]:
        return saved(path, **layout)

    def read() -> dict[str, Tensor]:
        return loaded(path, **two)

    before = together(4, {"saved": (write,)})["saved"][0]
    after = together(2, {"loaded": (read,)})["loaded"][0]
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def test_what_each_gives_can_be_looked_at() -> None:
    layer, seen = build(), []
    layer.experts.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(9, DIM, dtype=torch.float64)
    layer(x)
    route = layer.router(x)
    outputs = list(layer.experts.own_outputs(seen[0]))
    for number, (expert, output) in enumerate(zip(modules_of(layer), outputs, strict=True)):
        tokens, choice = (route.indices == number).nonzero(as_tuple=True)
        torch.testing.assert_close(output, expert(x[tokens]) * route.weights[tokens, choice][:, None])


def test_experts_begin_as_modules_that_are_made_one_by_one() -> None:
    layer = build()
    values = layer.experts.up_weight.data
    assert not torch.equal(values[0], values[1])
    assert values.abs().max() <= 1 / math.sqrt(DIM)
    again = build()
    assert torch.equal(again.experts.up_weight, values)


def test_a_class_is_named_with_its_arguments() -> None:
    config = DecoderConfig(**SIZES, expert_module=NAMED)
    decoder = model(expert_module=NAMED)
    decoder.configure_model()
    [(_, layer)] = decoder.decoder.moe_layers()
    assert layer.experts._template[0].slope == 0.3
    assert DecoderConfig(**SIZES, expert_module=Normed).expert_module == f"{__name__}.Normed"
    assert config.expert_module == NAMED


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"expert_module": WithBuffer}, "WithBuffer has buffers seen"),
        ({"expert_module": lambda dim, hidden: nn.Identity()}, "Identity has parameters"),
        ({"expert_module": "lightning_tex.Nothing"}, "lightning_tex.Nothing"),
        ({"expert_module": lambda dim, hidden: 3}, "made int"),
        ({"bias": True}, "bias=True"),
        ({"round_factor": 2.0}, "round_factor=2.0"),
        ({"residual_hidden_dim": 8, "shared_hidden_dim": 8}, "shared_hidden_dim=8 with residual_hidden_dim=8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_refused_by_name(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        build(**options)


def test_experts_that_would_be_sharded_are_refused_with_what_is_legal() -> None:
    with pytest.raises(UserError, match="legal: expert_tensor_parallel_size=1"):
        check_shardable(build(), Layout(4, tensor=2, expert=2, expert_tensor=2))


def test_the_page_of_documentation_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    page: dict[str, Any] = {}
    exec(code, page)
    layer, x = page["layer"], torch.randn(5, 16)
    route = layer.router(x)
    for t, row in enumerate(layer(x)):
        expected = torch.zeros(16)
        for weight, number in zip(route.weights[t], route.indices[t].tolist(), strict=True):
            expert = page["NormedExpert"](16, 32)
            for name, parameter in expert.named_parameters():
                parameter.data = getattr(layer.experts, name.replace(".", "_")).data[number]
            expected = expected + weight * expert(x[t])
        torch.testing.assert_close(row, expected)


def test_an_expert_that_gives_another_shape_is_told() -> None:
    layer = build(expert_module=lambda dim, hidden: nn.Linear(dim, hidden))
    with pytest.raises(UserError, match=r"Linear gave \[\d+, 10\] for \[\d+, 6\]"):
        layer(torch.randn(5, DIM, dtype=torch.float64))
