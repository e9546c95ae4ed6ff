"""Every router against the loop of its paper's definition: in one process and on ranks, forward and gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.behaviour_modules import TED, SmallDecoder, batches, new_trainer, on_data_axis
from helpers.cases import case
from helpers.plain_moe import expert
from helpers.plain_routers import PLAIN
from helpers.ranks import together
from helpers.topologies import join
from torch import Tensor, nn

from lightning_tex import LanguageModel
from lightning_tex.models import DecoderConfig
from lightning_tex.moe import MoE, Router, Tokens
from lightning_tex.moe.choice import largest
from lightning_tex.parallel.activation_checkpointing import recompute_blocks
from lightning_tex.parallel.collectives import all_reduce
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.sharding import parameter_shardings, shard_module
from lightning_tex.testing.ranks import run_ranks

DIM, EXPERTS, SEQUENCES, LENGTH = 6, 4, 4, 8  # of a micro-step over all data ranks

ROUTERS: dict[str, tuple[Any, int]] = {
    "softmax": ("softmax", 2),
    "sigmoid": ({"name": "sigmoid", "init_args": {"bias_update_rate": 0.1}}, 2),
    "groups": ({"name": "softmax", "init_args": {"n_group": 2, "topk_group": 1}}, 2),
    "sparsemixer": ({"name": "sparsemixer", "init_args": {"jitter_eps": 0.2}}, 2),
    "forced_balance": ("forced_balance", 2),
    "switch": ({"name": "switch", "init_args": {"jitter_eps": 0.3}}, 1),
    "gshard": ("gshard", 2),
    "sinkhorn": ("sinkhorn", 1),
    "hash": ("hash", 2),
    "expert_choice": ("expert_choice", 2),
    "expert_choice of the batch": ({"name": "expert_choice", "init_args": {"within": "batch"}}, 1),
}


class Block(nn.Module):
    """What is recomputed; ids go with the tokens."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        router, top_k = ROUTERS[name]
        self.mlp = MoE(DIM, 8, EXPERTS, top_k, router=router, load_balance_coefficient=0.0, **options).double()
        self.mlp.router.norm_topk_prob = self.mlp.router.norm_topk_prob or name == "softmax"
        if name == "sigmoid":
            self.mlp.router.correction_bias.copy_(torch.tensor([0.2, -0.1, 0.0, 0.1]))

    def forward(self, x: Tensor, mask: Tensor | None, ids: Tensor) -> Tensor:
        return x + self.mlp(x, mask, token_ids=ids)


def batch(masked: str = "some") -> tuple[Tensor, Tensor, Tensor]:
    """Sequences, which of their tokens are real, and ids; two tokens are alike."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SEQUENCES, LENGTH, DIM, generator=generator, dtype=torch.float64)
    x[0, 1] = x[0, 3] = x[2, 4]
    ids = torch.randint(0, 50, (SEQUENCES, LENGTH), generator=generator)
    mask = torch.rand(SEQUENCES, LENGTH, generator=generator) > 0.3
    mask[1] = False
    if masked == "all":
        mask[:] = False
    return x, mask, ids


def plain_output(name: str, layer: MoE, x: Tensor, mask: Tensor, ids: Tensor, training: bool) -> Tensor:
    """By the loop, one token after the other."""
    router, count = layer.router, SEQUENCES * LENGTH
    key = None
    if training and getattr(router, "noise", None) is not None:
        key = copy.deepcopy(router.noise)._next()
    rows = range(count)
    groups = [rows] if name.endswith("batch") else [rows[i : i + LENGTH] for i in range(0, count, LENGTH)]
    flat = x.reshape(count, DIM)
    chosen = PLAIN[name.split(" ")[0]](
        router, flat, mask.flatten().tolist(),
        key=key, places=list(rows), training=training, ids=ids.flatten(), groups=groups,
    )  # fmt: skip
    outputs = [
        sum((w * expert(layer.experts, e, token) for e, w in one.items()), token)
        for token, one in zip(flat, chosen, strict=True)
    ]
    return torch.stack(outputs).view_as(x)


def upstream(x: Tensor) -> Tensor:
    return torch.cos(torch.arange(x.numel(), dtype=x.dtype)).view_as(x)


@pytest.mark.parametrize("name", ROUTERS)
def test_in_one_process_it_is_the_loop(name: str) -> None:
    for training in (True, False):
        block = Block(name).train(training)
        reference, (x, mask, ids) = copy.deepcopy(block), batch()
        given, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
        plain = plain_output(name, reference.mlp, expected, mask, ids, training)
        plain.backward(upstream(x))
        y = block(given, mask, ids)
        y.backward(upstream(x))
        torch.testing.assert_close(y, plain)
        torch.testing.assert_close(given.grad, expected.grad)
        for (parameter, p), (_, q) in zip(block.named_parameters(), reference.named_parameters(), strict=True):
            found = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(found, torch.zeros_like(q) if q.grad is None else q.grad, msg=parameter)


# tensor, expert, expert_tensor; sequence parallel; recomputation; by ranks
LAYOUTS: dict[int, list[tuple[tuple[int, ...], bool, Any]]] = {
    2: [((2, 1, 2), True, "full"), ((2, 2, 1), False, "communication_aware"), ((1, 2, 1), False, None)],
    4: [
        ((2, 2, 2), False, "full"),
        ((2, 4, 1), True, "communication_aware"),
        ((1, 4, 1), False, None),
        ((4, 1, 4), True, "full"),
    ],
    8: [((2, 2, 2), True, "full"), ((2, 4, 1), False, "communication_aware"), ((4, 2, 4), True, None)],
}


def on_a_layout(name: str, layout: tuple[int, ...], sequence: bool, mode: Any, masked: str) -> None:
    topology = join(*layout, sequence_parallel=sequence)
    model, data, tensor = nn.Module(), topology.data, topology.tensor
    model.blocks = nn.ModuleList([Block(name)])
    reference = copy.deepcopy(model.blocks[0])
    shard_module(model, topology)
    recompute_blocks(model, mode)
    x, mask, ids = batch(masked)
    expected = x.clone().requires_grad_()
    plain = plain_output(name, reference.mlp, expected, mask, ids, True)
    plain.backward(upstream(x))

    def own(of_tokens: Tensor) -> Tensor:
        mine = of_tokens.chunk(data.size)[data.rank]
        return mine.chunk(tensor.size, 1)[tensor.rank] if sequence and of_tokens.dim() == 3 else mine

    given = own(x).clone().requires_grad_()
    y = model.blocks[0](given, own(mask), own(ids))
    y.backward(own(upstream(x)))
    close = {"rtol": 1e-10, "atol": 1e-11}
    torch.testing.assert_close(y, own(plain), **close)
    torch.testing.assert_close(given.grad, own(expected.grad), **close)
    found = parameter_shardings(model, topology)
    for parameter, p in model.named_parameters():
        at, whole = found[parameter], reference.get_parameter(parameter.removeprefix("blocks.0."))
        mine = torch.zeros_like(p) if p.grad is None else p.grad
        if sequence and parameter.endswith("router.weight"):
            mine = all_reduce(mine, tensor)
        gradient = at.gather(all_reduce(mine, at.replicas))
        other = torch.zeros_like(whole) if whole.grad is None else whole.grad
        torch.testing.assert_close(gradient, other, msg=lambda m, n=parameter: f"{n}: {m}", **close)


def all_on_layouts(layouts: list[Any], masks: tuple[str, ...]) -> None:
    for name in ROUTERS:
        for layout in layouts:
            for masked in masks:
                with case(name, layout, masked):
                    on_a_layout(name, *layout, masked)


def test_on_ranks_it_is_the_loop_over_all_of_their_tokens() -> None:
    run_ranks(4, all_on_layouts, LAYOUTS[4][:2], ("some",))


@pytest.mark.full
@pytest.mark.parametrize("world", LAYOUTS)
def test_on_all_layouts_it_is_the_loop_over_all_of_their_tokens(world: int) -> None:
    run_ranks(world, all_on_layouts, LAYOUTS[world], ("some", "all"), timeout=300)


# --- what is hard


EXTREMES = {"nobody": 0, "one token": 1, "more experts than tokens": 2}
TIES_FIRST = ("softmax", "groups", "sparsemixer", "switch", "gshard", "sinkhorn")  # without a bias, place or hash
NOT_FINITE = {"NaN": float("nan"), "infinite": float("inf")}


def extremes() -> None:
    """Right, and nobody waits: everybody's scores are even, so that ties decide, or there are no tokens."""
    for layout, sequence, _ in LAYOUTS[4][1:3]:
        topology = join(*layout, sequence_parallel=sequence)
        for name in ROUTERS:
            for what, count in EXTREMES.items():
                with case(name, layout, what):
                    model = nn.Module()
                    model.blocks = nn.ModuleList([Block(name)])
                    shard_module(model, topology)
                    nn.init.zeros_(model.blocks[0].mlp.router.weight) if model.blocks[0].mlp.router.learned else None
                    x = torch.ones(count, 1, DIM, dtype=torch.float64, requires_grad=True)
                    y = model.blocks[0](x, None, torch.zeros(count, topology.tensor.size if sequence else 1).long())
                    y.sum().backward()
                    assert y.isfinite().all() and y.shape == x.shape
                    route = model.blocks[0].mlp.router.eval()(x[:, 0], Tokens(None, torch.zeros(count).long()))
                    if name in TIES_FIRST:
                        assert route.indices.tolist() == [list(range(route.indices.shape[1]))] * count


def not_finite() -> None:
    """Of one data rank's tokens: what comes of it is not finite, but every choice is an expert, and nobody waits."""
    for layout, sequence, _ in LAYOUTS[4][1:3]:
        topology = join(*layout, sequence_parallel=sequence)
        for name in (name for name in ROUTERS if name != "hash"):
            for what, value in NOT_FINITE.items():
                with case(name, layout, what):
                    model = nn.Module()
                    model.blocks = nn.ModuleList([Block(name)])
                    shard_module(model, topology)
                    x = torch.full((2, 1, DIM), value if topology.data.rank == 0 else 1.0, dtype=torch.float64)
                    indices = model.blocks[0].mlp.router(x[:, 0], Tokens(sequences=2)).indices
                    assert ((indices >= 0) & (indices <= EXPERTS)).all()
                    y = model.blocks[0](x.requires_grad_(), None, torch.zeros(2, 1).long())
                    y.sum().backward()
                    assert topology.data.rank > 0 or not y.isfinite().all()


@pytest.mark.parametrize("function", [extremes, not_finite])
def test_nobody_waits_and_choices_are_experts(function: Callable[[], None]) -> None:
    run_ranks(4, function)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_of_equal_values_the_first_is_larger(dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    rows = [[1, 3, 3, 0, 3], [-1, -1, -2, -1, -3], [0.0, -0.0, 0.0, -0.0, -1], [-inf, -inf, 0, -inf, inf]]
    rows.append([0, nan, 1, nan, inf])
    wanted = [[1, 2, 4, 0], [0, 1, 3, 2], [0, 1, 2, 3], [4, 2, 0, 1], [1, 3, 4, 2]]
    values = torch.tensor(rows, dtype=dtype)
    assert largest(values, 4).tolist() == wanted
    assert largest(values, 1).tolist() == [row[:1] for row in wanted]
    random = torch.randn(50, 9).to(dtype)
    assert torch.equal(largest(random, 3), random.sort(dim=-1, descending=True, stable=True).indices[:, :3])


@pytest.mark.parametrize(
    ("router", "options", "message"),
    [
        ("switch", {"top_k": 2}, "router 'switch' with top_k=2; legal: 1"),
        ("gshard", {"top_k": 1}, "router 'gshard' with top_k=1; legal: 2"),
        ("expert_choice", {"capacity_factor": 1.0}, "capacity_factor=1.0 with ExpertChoiceRouter"),
        ({"name": "expert_choice", "init_args": {"within": "world"}}, {}, "within='world'; legal: 'sequence', 'batch'"),
        ({"name": "expert_choice", "init_args": {"n_group": 2}}, {}, "n_group=2 of the router 'expert_choice'"),
        ({"name": "sinkhorn", "init_args": {"iterations": 0}}, {}, "iterations=0 of the router 'sinkhorn'"),
        ({"name": "switch", "init_args": {"jitter_eps": 1.0}}, {}, "jitter_eps=1.0; legal"),
        *(
            (name, {"top_k": 5}, "top_k=5 must be between 1 and num_experts=4")
            for name in ("sinkhorn", "expert_choice")
        ),
    ],
)
def test_what_cannot_be_is_refused(router: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserValueError, match=message):
        MoE(DIM, 8, EXPERTS, router=router, **options)


def test_a_hash_needs_ids() -> None:
    with pytest.raises(UserValueError, match="router 'hash' without token ids"):
        MoE(DIM, 8, EXPERTS, router="hash")(torch.randn(2, DIM))


def test_jitter_is_another_one_in_each_forward_and_goes_on_through_a_state_dict() -> None:
    first, (x, mask, ids) = Block("switch"), batch()
    again = copy.deepcopy(first)
    outputs = [first(x, mask, ids) for _ in range(3)]
    assert not torch.equal(outputs[0], outputs[1])
    again(x, mask, ids)
    resumed = Block("switch")
    resumed.load_state_dict(again.state_dict())
    assert torch.equal(resumed(x, mask, ids), outputs[1])
    assert torch.equal(first.eval()(x, mask, ids), again.eval()(x, mask, ids))


def test_jitter_differs_between_layers_and_lies_where_it_is_said_to() -> None:
    routers = [MoE(DIM, 8, EXPERTS, router=ROUTERS["switch"][0]).router for _ in range(2)]
    with torch.no_grad():
        for router in routers:
            router.weight.copy_(torch.eye(EXPERTS, DIM))
    seen = [router(torch.ones(4000, DIM)).logits.detach() for router in routers]
    assert not torch.equal(*seen)
    for logits in seen:
        assert 0.7 <= logits.min() < 0.701 and 1.299 < logits.max() < 1.3
        assert abs(float(logits.mean()) - 1) < 0.01


def test_gshard_keeps_a_second_choice_with_twice_its_weight() -> None:
    torch.manual_seed(0)
    router = MoE(DIM, 8, EXPERTS, 2, router="gshard").router
    route = router(torch.randn(1, DIM).expand(8000, DIM))
    weight = float(router.eval()(torch.ones(1, DIM) * 0).weights.detach()[0, 1])
    assert weight == 0.5
    second = float(route.weights.detach()[route.indices[:, 1] < EXPERTS, 1][0])
    assert abs(float((route.indices[:, 1] < EXPERTS).double().mean()) - 2 * second) < 0.02


# --- in a model


class Own(Router):
    def score(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()


SIZES = {
    "load_balance_coefficient": 0.0,
    "vocab_size": 61,
    "dim": 16,
    "num_heads": 2,
    "num_layers": 2,
    "hidden_dim": 16,
    "num_experts": 4,
    "top_k": 2,
}


def test_a_decoder_takes_a_name_with_arguments_or_a_class_and_keeps_plain_values() -> None:
    named = {"name": "hash", "init_args": {"seed": 3}}
    ids = torch.arange(12).view(2, 6)
    for choice in (named, "gshard", Own, {"name": Own, "init_args": {"bias": True}}):
        config = DecoderConfig(**SIZES, router=choice)
        model = LanguageModel(config)
        model.configure_model()
        model(ids).sum().backward()
        name = config.router["name"] if isinstance(config.router, dict) else config.router
        assert choice in (named, "gshard") or name == f"{__name__}.Own"
    with pytest.raises(UserValueError, match="is no plain value"):
        DecoderConfig(**SIZES, router=Own(16, 4, 2))


def losses(layout: dict[str, Any], name: str) -> Tensor:
    """Of a decoder with these routers, trained on this rank's part."""
    module = SmallDecoder(router=ROUTERS[name][0], top_k=ROUTERS[name][1])
    trainer = new_trainer(layout)
    trainer.fit(module, on_data_axis(trainer, [[part[:, :4] for part in given] for given in batches(4)]))
    return trainer.strategy.reduce(torch.stack(module.losses), reduce_op="mean")


@pytest.mark.parametrize(
    "names",
    [("switch", "expert_choice"), pytest.param(("gshard", "sinkhorn", "hash"), marks=pytest.mark.full)],
    ids=["two", "others"],
)
def test_a_training_is_the_same_on_every_layout(names: tuple[str, ...]) -> None:
    of_one = together(1, {name: (losses, {}, name) for name in names})
    sequence = {**TED, "sequence_parallel": True, "activation_checkpointing": "full"}
    for layout in ({}, sequence) if len(names) > 2 else (sequence,):
        for name, ranks in together(4, {name: (losses, layout, name) for name in names}).items():
            with case(name, layout):
                torch.testing.assert_close(ranks[0], of_one[name][0], rtol=1e-10, atol=0)


def test_nothing_is_generated_by_a_model_whose_experts_choose() -> None:
    model = LanguageModel(DecoderConfig(**SIZES, router="expert_choice"))
    model.configure_model()
    with pytest.raises(
        UserValueError, match=r"blocks\.1\.mlp\.router is a ExpertChoiceRouter, which chooses experts by all tokens"
    ):
        model.generate(torch.zeros(1, 2, dtype=torch.long), 1)


@pytest.mark.parametrize("router", ["hash", "sinkhorn", "gshard"])
def test_generated_tokens_are_those_of_whole_forwards(router: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel(DecoderConfig(**SIZES, router=router))
    model.configure_model()
    prompt = torch.arange(10).view(2, 5)
    found = model.generate(prompt, 4, temperature=0)
    model.eval()
    for length in range(5, 9):
        assert torch.equal(model(found[:, :length]).argmax(-1)[:, -1], found[:, length])
