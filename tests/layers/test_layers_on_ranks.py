"""Every layer sharded over 2 and 4 tensor ranks equals itself in one process, in fp64, forward and gradients."""

import copy
import itertools

import torch
import torch.nn.functional as F
from helpers.cases import case
from helpers.topologies import join
from torch import nn

from lightning_tex.layers import (
    ColumnParallelLinear,
    ParallelAttention,
    ParallelMLP,
    RowParallelLinear,
    VocabParallelCrossEntropy,
    VocabParallelEmbedding,
    VocabParallelHead,
    VocabParallelLinearCrossEntropy,
)
from lightning_tex.layers import linear_cross_entropy as chunks
from lightning_tex.parallel.activation_layout import Replicated
from lightning_tex.parallel.rank_random_state import rank_random_state
from lightning_tex.parallel.sharding import check_shardable, parameter_shardings, shard_module
from lightning_tex.parallel.topology import Axis
from lightning_tex.testing.ranks import run_ranks

IDS = torch.tensor([[0, 60, 17, 15, 16], [31, 32, 47, 48, 59]])
FEW = torch.tensor([[0, 1, 2, 3, 4], [4, 4, 0, 1, 3]])


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def own(x, axis, dim=-1):
    return x.chunk(axis.size, dim)[axis.rank].contiguous()


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def both(topology, layer, x, upstream, part_in=False, part_out=False, call=None, part_of=own):
    """Run ``layer`` whole and sharded; compare output, gradient of the input and of every parameter.

    ``part_in``, ``part_out``: the sharded layer takes, or gives, only its own part of the last dim.
    """
    call = call or (lambda module, x: module(x))
    layer = layer.double()
    parted = copy.deepcopy(layer)
    check_shardable(parted, topology.layout)
    shard_module(parted, topology)
    tensor = topology.tensor
    differentiable = x.is_floating_point()

    whole_x = x.clone().requires_grad_(differentiable)
    expected = call(layer, whole_x)
    expected.backward(upstream)

    own_x = (own(x, tensor) if part_in else x.clone()).requires_grad_(differentiable)
    y = call(parted, own_x)
    same(y, part_of(expected, tensor) if part_out else expected)
    y.backward(part_of(upstream, tensor) if part_out else upstream)
    if differentiable:
        same(own_x.grad, own(whole_x.grad, tensor) if part_in else whole_x.grad)
    found = parameter_shardings(parted, topology)
    for (name, p), (_, reference) in zip(parted.named_parameters(), layer.named_parameters(), strict=True):
        with case(gradient=name):
            same(found[name].gather(p.grad), reference.grad)


def padded_part(fill):
    def part(x, axis):
        rows = -(-x.shape[-1] // axis.size)
        return F.pad(x, (0, rows * axis.size - x.shape[-1]), value=fill)[..., rows * axis.rank : rows * (axis.rank + 1)]

    return part


def linear_layers():
    for tensor in (2, 4):
        topology = join(tensor)
        for bias in (True, False):
            with case(tensor=tensor, bias=bias):
                torch.manual_seed(0)
                both(topology, ColumnParallelLinear(6, 8, bias), randn(1, 2, 3, 6), randn(2, 2, 3, 8), part_out=True)
                both(
                    topology, ColumnParallelLinear(6, 8, bias, gather_output=True), randn(1, 2, 3, 6), randn(2, 2, 3, 8)
                )
                both(topology, RowParallelLinear(8, 6, bias), randn(1, 2, 3, 8), randn(2, 2, 3, 6), part_in=True)
                for activation in ("gelu", "swiglu"):
                    with case(activation=activation):
                        both(topology, ParallelMLP(6, 8, activation, bias), randn(1, 2, 3, 6), randn(2, 2, 3, 6))


def test_linear_layers_and_mlp():
    run_ranks(4, linear_layers)


def attention():
    padding = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    for tensor in (2, 4):
        topology = join(tensor)
        for kv_heads, bias, causal, mask in (
            (None, False, True, None),
            (4, True, False, None),
            (8, True, True, padding),
            (4, False, False, randn(3, 2, 1, 5, 5) > 0),
        ):
            with case(tensor=tensor, kv_heads=kv_heads, bias=bias, causal=causal, masked=mask is not None):
                torch.manual_seed(0)
                layer = ParallelAttention(32, 8, kv_heads, bias, causal=causal)
                both(topology, layer, randn(1, 2, 5, 32), randn(2, 2, 5, 32), call=lambda m, x, k=mask: m(x, k))


def test_attention():
    run_ranks(4, attention)


def vocabulary():
    for tensor in (2, 4):
        topology = join(tensor)
        torch.manual_seed(0)
        for size, ids in ((61, IDS), (64, IDS), (5, FEW)):
            with case(tensor=tensor, size=size):
                both(topology, VocabParallelEmbedding(size, 6), ids, randn(2, 2, 5, 6))
                both(topology, VocabParallelHead(6, size, gather_output=True), randn(1, 2, 5, 6), randn(2, 2, 5, size))
                expected = VocabParallelHead(6, size).double()
                parted = copy.deepcopy(expected)
                shard_module(parted, topology)
                x, y = randn(1, 2, 5, 6).requires_grad_(), randn(1, 2, 5, 6).requires_grad_()
                logits = parted(x)
                whole = expected(y)
                same(logits, padded_part(float("-inf"))(whole, topology.tensor))
                logits.backward(padded_part(9.0)(randn(2, 2, 5, size), topology.tensor))  # padding's is ignored
                whole.backward(randn(2, 2, 5, size))
                same(x.grad, y.grad)
                found = parameter_shardings(parted, topology)["weight"]
                same(found.gather(parted.weight.grad), expected.weight.grad)
                same(parted.weight.grad, found.box.shard(expected.weight.grad))


def test_embedding_and_head():
    run_ranks(4, vocabulary)


def cross_entropy():
    for tensor in (2, 4):
        topology = join(tensor)
        for size, target in ((61, IDS), (64, IDS), (5, FEW)):
            target = target.clone()
            target[1, 2] = -100
            for reduction in ("mean", "sum", "none"):
                with case(tensor=tensor, size=size, reduction=reduction):
                    loss = VocabParallelCrossEntropy(reduction=reduction)
                    loss.bind(topology)
                    whole = (4 * randn(1, 2, 5, size)).requires_grad_()
                    part = padded_part(float("-inf"))(whole.detach(), topology.tensor).requires_grad_()
                    ours = loss(part, target)
                    theirs = F.cross_entropy(whole.flatten(0, 1), target.flatten(), reduction=reduction)
                    same(ours.flatten(), theirs.flatten())
                    ours.backward(torch.ones_like(ours))
                    theirs.backward(torch.ones_like(theirs))
                    same(part.grad, padded_part(0.0)(whole.grad, topology.tensor))
        with case("no target counts", tensor=tensor):
            loss = VocabParallelCrossEntropy()
            loss.bind(topology)
            part = randn(1, 2, 5, 16).requires_grad_()
            nothing = loss(part, torch.full((2, 5), -100))
            nothing.backward()
            assert nothing == 0 and not part.grad.any()


def test_cross_entropy():
    run_ranks(4, cross_entropy)


def linear_cross_entropy():
    """The vocabulary whole and sharded, sequences whole and sharded, in one chunk and in many."""
    for tensor, sequence, chunk in itertools.product((2, 4), (False, True), (1 << 20, 3 * 16 * 8)):
        chunks.CHUNK_BYTES["cpu"] = chunk
        topology = join(tensor, sequence_parallel=sequence)
        for (size, fill), reduction in itertools.product(((61, 0), (64, 1), (5, 2)), ("mean", "sum", "none")):
            with case(tensor=tensor, sequence=sequence, chunk=chunk, size=size, reduction=reduction):
                target = torch.randint(size, (2, 8), generator=torch.Generator().manual_seed(fill))
                target[1, 2:4] = -100
                torch.manual_seed(0)
                head = VocabParallelHead(6, size).double()
                whole = (4 * randn(1, 2, 8, 6)).requires_grad_()
                theirs = F.cross_entropy(head(whole).transpose(1, 2), target, reduction=reduction)
                theirs.backward(upstream := randn(2, *theirs.shape))
                parted = copy.deepcopy(head)
                parted.weight.grad = None
                shard_module(parted, topology)
                loss = VocabParallelLinearCrossEntropy(reduction=reduction)
                x = (own(whole.detach(), topology.tensor, 1) if sequence else whole.detach().clone()).requires_grad_()
                ours = loss(x, parted, target)
                same(ours, theirs)
                ours.backward(upstream)
                same(x.grad, own(whole.grad, topology.tensor, 1) if sequence else whole.grad)
                found = parameter_shardings(parted, topology)["weight"]
                same(found.gather(parted.weight.grad), head.weight.grad)
                same(parted.weight.grad, found.box.shard(head.weight.grad))  # padding rows have none


def test_linear_cross_entropy():
    run_ranks(4, linear_cross_entropy)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = VocabParallelEmbedding(61, 6), VocabParallelHead(6, 61, gather_output=True)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids))


def tied():
    for tensor in (2, 4):
        with case(tensor=tensor):
            torch.manual_seed(0)
            both(join(tensor), Tied(), IDS, randn(2, 2, 5, 61))


def test_tied_embedding_and_head():
    run_ranks(4, tied)


def random_states():
    topology = join(tensor=2)
    torch.manual_seed(7 + topology.data.rank)
    with rank_random_state(topology.tensor):
        inside = torch.rand(8)
    after = torch.rand(8)
    with rank_random_state(topology.tensor, enabled=False):
        disabled = torch.rand(8)

    layer = ParallelAttention(16, 4, dropout=0.5)
    shard_module(layer, topology)
    masks = [p.detach() for p in (layer.query.weight, layer.value.weight, layer.key.weight)]
    for weight in masks:
        weight.fill_(0.1)  # every head is alike: only the dropout masks can differ
    layer.out.weight.data.fill_(1.0)
    x = torch.ones(1, 6, 16)
    with collectives_identity(layer):
        head_outputs = layer(x)
    after_attention = torch.rand(8)
    layer.eval()
    torch.manual_seed(0)
    layer(x)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1)), "evaluation must not draw"
    return [t.detach().tolist() for t in (inside, after, disabled, head_outputs, after_attention)]


class collectives_identity:
    """Within, the output projection sums nothing over tensor: each rank sees its own heads."""

    def __init__(self, layer):
        self.layer = layer

    def __enter__(self):
        self.activation_layout, self.layer.out.activation_layout = (
            self.layer.out.activation_layout,
            Replicated(Axis("tensor")),
        )

    def __exit__(self, *_):
        self.layer.out.activation_layout = self.activation_layout


def test_masks_differ_over_tensor_and_the_state_afterwards_is_equal():
    results = run_ranks(4, random_states)
    for a, b in ((0, 1), (2, 3)):
        with case(tensor_ranks=(a, b)):
            inside, after, disabled, heads, after_attention = zip(results[a], results[b], strict=True)
            assert inside[0] != inside[1]
            assert after[0] == after[1]
            assert disabled[0] == disabled[1]
            assert heads[0] != heads[1]
            assert after_attention[0] == after_attention[1]
    assert results[0][1] != results[2][1]  # different over data
