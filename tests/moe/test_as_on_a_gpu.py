"""A whole layer by the code that a GPU runs, on a CPU: grouped products, and compiled leaves."""

import copy
import itertools
import math

import pytest
import torch
from helpers.cases import case
from helpers.plain_moe import plain_losses, plain_moe
from helpers.topologies import join

from lightning_tex.moe import MoE, activation, auxiliary_loss, exchange, losses, permute
from lightning_tex.moe.groups import Groups
from lightning_tex.moe.products import GroupedProducts, LoopedProducts
from lightning_tex.parallel.compiled import Leaf, compile_leaves
from lightning_tex.parallel.device import pretend_device
from lightning_tex.parallel.sharding import shard_module
from lightning_tex.testing.ranks import run_ranks

TOKENS, DIM, HIDDEN, EXPERTS = 40, 8, 16, 6
MASK = torch.arange(TOKENS) % 5 > 0
OPTIONS = [
    {"top_k": 2, "activation": "swiglu", "norm_topk_prob": True},
    {"top_k": 1, "activation": "gelu"},
    {"top_k": 3, "activation": "swiglu", "capacity_factor": 0.7},
    {"top_k": 2, "activation": "gelu", "capacity_factor": 4.0},
]


def built(dtype, **options):
    torch.manual_seed(0)
    layer = MoE(DIM, HIDDEN, EXPERTS, load_balance_coefficient=0.1, z_loss_coefficient=0.1, **options).to(dtype)
    layer.router.weight.data.mul_(4)  # no near ties, which precisions would break otherwise; and experts without tokens
    return layer


def outcome(layer, x, mask):
    """Output, loss and gradients."""
    x = x.clone().requires_grad_()
    y = layer(x, mask)
    loss = (y * torch.cos(torch.arange(y.numel()).view(y.shape))).sum() + auxiliary_loss(layer)
    loss.backward()
    return [y.detach(), loss.detach(), x.grad, *(p.grad for p in layer.parameters())]


def plain_outcome(layer, x, mask):
    """The same by loops over tokens and choices."""
    x = x.clone().requires_grad_()
    allowed = layer.capacity_factor and math.ceil(layer.capacity_factor * layer.top_k * TOKENS / EXPERTS)
    plain = plain_moe(layer, x, mask, allowed)
    balance, z = plain_losses([plain], [mask], EXPERTS)
    y = plain.output
    loss = (y * torch.cos(torch.arange(y.numel()).view(y.shape))).sum() + 0.1 * balance + 0.1 * z
    loss.backward()
    return [y.detach(), loss.detach(), x.grad, *(p.grad for p in layer.parameters())]


def close(found, expected, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        norm = theirs.norm()
        assert (ours.double() - theirs).norm() <= tolerance * norm, (ours.shape, (ours.double() - theirs).norm() / norm)


@pytest.fixture
def grouped(monkeypatch):
    """Products of every dtype are grouped, as on a GPU those of bf16 are; how many were."""
    calls, grouped_mm = [], torch.nn.functional.grouped_mm
    monkeypatch.setattr(GroupedProducts, "take", staticmethod(lambda dtype, matrices: True))
    monkeypatch.setattr(
        torch.nn.functional, "grouped_mm", lambda *args, **kwargs: calls.append(1) or grouped_mm(*args, **kwargs)
    )
    with pretend_device("cuda"):
        yield calls


@pytest.mark.parametrize("mask", [None, MASK], ids=["", "masked"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_of_grouped_products_are_the_loops(grouped, options, mask):
    x = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(1))
    layer = built(torch.float32, **options)
    found = outcome(copy.deepcopy(layer), x, mask)
    assert len(grouped) == (9 if options["activation"] == "swiglu" else 6)
    close(found, plain_outcome(layer.double(), x.double(), mask), 2e-6)


@pytest.mark.parametrize("options", OPTIONS[::2], ids=str)
def test_the_same_code_with_a_loop_of_products_in_fp64(options):
    x = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layer = built(torch.float64, **options)
    with pretend_device("cuda"):
        found = outcome(copy.deepcopy(layer), x, MASK)
    close(found, plain_outcome(layer, x, MASK), 1e-13)


def grouped_on_ranks():
    for layout, chunks, options in itertools.product(((1, 2, 1), (2, 2, 1), (2, 1, 2)), (1, 2), OPTIONS):
        found = []
        for take in (True, False):
            with pytest.MonkeyPatch.context() as patched, pretend_device("cuda"), case(layout, chunks, **options):
                patched.setattr(GroupedProducts, "take", staticmethod(lambda dtype, matrices, take=take: take))
                topology = join(*layout, expert_chunks=chunks)
                layer = built(torch.float32, **options)
                shard_module(layer, topology)
                x = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(topology.data.rank))
                found.append(outcome(layer, x, MASK))
        close(found[0], [value.double() for value in found[1]], 2e-6)


def test_grouped_products_of_rows_that_have_travelled_are_the_loops():
    run_ranks(2, grouped_on_ranks)


@pytest.mark.parametrize("products", [GroupedProducts, LoopedProducts])
def test_gradients_of_matrices_are_added_to_what_is_there(products):
    made, grad, rows = products(Groups.of([3, 0, 5])), torch.randn(8, 8), torch.randn(8, 12)
    before = torch.randn(3, 8, 12)
    alone = made.matrices_backward(grad, rows)
    added_to = before.clone()
    assert made.matrices_backward(grad, rows, added_to) is added_to
    torch.testing.assert_close(added_to, before + alone)
    empty = products(Groups.of([0, 0, 0]))
    assert torch.equal(empty.matrices_backward(grad[:0], rows[:0], before.clone()), before)


# --- compiled leaves


@pytest.fixture
def compiled():
    compile_leaves(True)
    with pretend_device("cuda"):
        yield
    compile_leaves("auto")


def compiled_against_eager(options, mask):
    x = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(1))
    layer = built(torch.float32, **options)
    found = outcome(copy.deepcopy(layer), x, mask)
    compile_leaves(False)
    close(found, [value.double() for value in outcome(layer, x, mask)], 2e-6)


# Of torch itself: while it loads the compiler, and of what tracing looks at.
without_warnings = pytest.mark.filterwarnings(
    "ignore:.*script_method:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)


@without_warnings
@pytest.mark.parametrize("options", OPTIONS[::3], ids=str)
def test_a_layer_of_traced_leaves_is_that_of_eager_ones(compiled, monkeypatch, options):
    traced, compile_ = [], torch.compile

    def by_tracing(function, **kwargs):  # all of a compiler but the kernels, which take minutes
        traced.append(function.__name__)
        return compile_(function, backend="aot_eager", **kwargs)

    monkeypatch.setattr(torch, "compile", by_tracing)
    fresh(monkeypatch)
    compiled_against_eager(options, MASK)
    between = f"_{options['activation']}"
    assert {between, f"{between}_backward", "_totals", "_loss", "_pick_or_zero"} <= set(traced)


@without_warnings
@pytest.mark.full
@pytest.mark.parametrize("mask", [None, MASK], ids=["", "masked"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_layer_of_compiled_leaves_is_that_of_eager_ones(compiled, options, mask):
    compiled_against_eager(options, mask)


def fresh(monkeypatch):
    """Leaves that have been compiled are so no longer."""
    for module in (activation, exchange, losses, permute):
        for value in vars(module).values():
            if isinstance(value, Leaf):
                monkeypatch.setattr(value, "_compiled", None)
