"""Every layer in one process against torch.nn or an implementation written here, forward and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import case
from torch import nn

from lightning_tex.layers import (
    ColumnParallelLinear,
    ParallelAttention,
    ParallelMLP,
    RMSNorm,
    Rotary,
    RowParallelLinear,
    VocabParallelCrossEntropy,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from lightning_tex.parallel.layout import Layout


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def agree(ours, theirs, inputs, parameters, rtol=1e-12):
    """Both callables give the same output and the same gradients of all inputs and parameters."""
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    leaves = [t for t in (*inputs, *parameters) if t.requires_grad]
    a, b = ours(*inputs), theirs(*inputs)
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)
    upstream = torch.randn_like(a)
    gradients = (torch.autograd.grad(out, leaves, upstream) for out in (a, b))
    for number, (mine, reference) in enumerate(zip(*gradients, strict=True)):
        with case("gradient of an input, then of the parameters", number):
            torch.testing.assert_close(mine, reference, rtol=rtol, atol=rtol)


# --- linear, embedding, head


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
def test_linear_layers_are_nn_linear(kind, bias):
    layer, reference = kind(6, 10, bias).double(), nn.Linear(6, 10, bias).double()
    reference.load_state_dict(layer.state_dict())  # same names and shapes
    reference.weight, reference.bias = layer.weight, layer.bias
    agree(layer, reference, [torch.randn(3, 4, 6).double()], list(layer.parameters()))


def test_embedding_and_head_are_the_plain_ones():
    embedding, head = VocabParallelEmbedding(11, 6).double(), VocabParallelHead(6, 11).double()
    ids = torch.randint(11, (3, 5))
    agree(embedding, lambda i: F.embedding(i, embedding.weight), [ids], [embedding.weight])
    agree(head, lambda x: x @ head.weight.T, [torch.randn(3, 5, 6).double()], [head.weight])
    whole = VocabParallelHead(6, 11, gather_output=True).double()
    agree(whole, lambda x: x @ whole.weight.T, [torch.randn(3, 6).double()], [whole.weight])


def test_norm_is_nn_rmsnorm_and_computes_in_its_weights_dtype():
    norm = RMSNorm(16, eps=1e-5)
    nn.init.normal_(norm.weight)
    x = torch.randn(4, 16)

    def by_hand(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight

    agree(norm, by_hand, [x], [norm.weight], rtol=1e-5)
    low = x.bfloat16()
    assert torch.equal(norm(low), norm(low.float()).bfloat16())


# --- cross-entropy


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_cross_entropy_is_the_plain_one(reduction, ignore_index):
    loss = VocabParallelCrossEntropy(ignore_index, reduction)
    target = torch.randint(11, (4, 5))
    target[0, :3] = ignore_index

    def plain(logits):
        return F.cross_entropy(logits.transpose(1, 2), target, ignore_index=ignore_index, reduction=reduction)

    agree(lambda z: loss(z, target), plain, [5 * torch.randn(4, 5, 11).double()], [])


def test_cross_entropy_of_bf16_logits_is_computed_in_fp32():
    logits = (10 * torch.randn(64, 50)).bfloat16().requires_grad_()
    target = torch.randint(50, (64,))
    wide = logits.detach().float().requires_grad_()
    loss, reference = VocabParallelCrossEntropy()(logits, target), F.cross_entropy(wide, target)
    loss.backward()
    reference.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=0)
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad.float(), wide.grad, rtol=2**-8, atol=1e-9)


def test_cross_entropy_survives_large_logits_and_does_not_change_its_input():
    logits = torch.tensor([[1e4, 0.0, -1e4], [float("-inf"), 0.0, 1.0]])
    kept = logits.clone()
    loss = VocabParallelCrossEntropy(reduction="none")(logits, torch.tensor([1, 2]))
    torch.testing.assert_close(loss, torch.tensor([1e4, math.log(1 + math.exp(-1))]))
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_without_counted_targets_is_zero_with_zero_gradient(reduction):
    logits = torch.randn(4, 11, requires_grad=True)
    loss = VocabParallelCrossEntropy(reduction=reduction)(logits, torch.full((4,), -100))
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction='max'; legal: 'mean', 'sum', 'none'"):
        VocabParallelCrossEntropy(reduction="max")


# --- MLP


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_mlp_is_the_plain_one(activation, bias):
    mlp = ParallelMLP(6, 10, activation, bias).double()
    w = dict(mlp.named_parameters())

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + (w[f"{name}.bias"] if bias else 0)

    def plain(x):
        up = linear(x, "up")
        if activation == "gelu":
            hidden = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
        else:
            gate = linear(x, "gate")
            hidden = gate / (1 + torch.exp(-gate)) * up
        return linear(hidden, "down")

    assert len(w) == (3 if activation == "swiglu" else 2) * (2 if bias else 1)
    agree(mlp, plain, [torch.randn(3, 4, 6).double()], list(w.values()))


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"activation='tanh'; legal: 'gelu', .*'swiglu'"):
        ParallelMLP(4, 8, "tanh")


# --- attention


def plain_attention(layer, x, mask=None):
    """Head by head, with rotation as a product of complex numbers. ``mask``: [B, 1, S, S] of what may be seen."""
    batch, length, _ = x.shape
    heads, shared, width = layer.num_heads, layer.num_heads // layer.num_kv_heads, layer.head_dim

    def project(part, x):
        return x @ part.weight.T + (0 if part.bias is None else part.bias)

    wavelength = layer.rotary.base ** (torch.arange(width // 2).double() / (width // 2))
    angle = torch.arange(length).double()[:, None] / wavelength
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotate(x):  # [B, S, d]
        turned = torch.complex(x[..., : width // 2], x[..., width // 2 :]) * turn
        return torch.cat([turned.real, turned.imag], -1)

    seen = torch.ones(length, length).tril().bool() if layer.causal else torch.ones(length, length).bool()
    seen = seen.expand(batch, 1, length, length)
    if mask is not None:
        seen = seen & mask
        blind = ~seen.any(-1, keepdim=True)
        seen = seen | (blind & torch.eye(length).bool())
    q, k, v = project(layer.query, x), project(layer.key, x), project(layer.value, x)
    outputs = []
    for head in range(heads):
        own, group = slice(head * width, (head + 1) * width), head // shared
        of_group = slice(group * width, (group + 1) * width)
        scores = rotate(q[..., own]) @ rotate(k[..., of_group]).transpose(1, 2) / math.sqrt(width)
        weights = torch.where(seen[:, 0], scores, float("-inf")).softmax(-1)
        outputs.append(weights @ v[..., of_group])
    return project(layer.out, torch.cat(outputs, -1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [None, 4, 2, 1])
def test_attention_is_the_plain_one(kv_heads, causal, bias):
    layer = ParallelAttention(16, 4, kv_heads, bias=bias, causal=causal, rope_base=100.0).double()
    agree(layer, lambda x: plain_attention(layer, x), [torch.randn(2, 7, 16).double()], list(layer.parameters()))


PADDING = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
MASKS = {
    "2d bool": (PADDING.bool(), PADDING.bool()[:, None, None]),
    "2d int": (PADDING, PADDING.bool()[:, None, None]),
    "4d": ((m := torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(1)) > 0.4), m),
    "4d over queries": ((n := torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(2)) > 0.4), n),
    "nothing": (torch.zeros(2, 6).bool(), torch.zeros(2, 1, 1, 6).bool()),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_under_a_mask_is_the_plain_one(mask, causal):
    given, seen = MASKS[mask]
    layer = ParallelAttention(16, 4, 2, causal=causal).double()
    agree(
        lambda x: layer(x, given),
        lambda x: plain_attention(layer, x, seen),
        [torch.randn(2, 6, 16).double()],
        list(layer.parameters()),
    )


def test_masked_positions_do_not_influence_seen_ones():
    layer = ParallelAttention(16, 4, causal=False).double()
    x = torch.randn(1, 6, 16).double()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    changed = x.clone()
    changed[:, 4:] += 1
    torch.testing.assert_close(layer(x, mask)[:, :4], layer(changed, mask)[:, :4], rtol=0, atol=0)


def test_scores_depend_on_distance_only():
    x = torch.randn(1, 5, 4, 4).double()  # [B, S, H, d]
    shifted = F.pad(x, (0, 0, 0, 0, 3, 0))

    def scores(x):
        query, key = (t.transpose(1, 2) for t in Rotary(4).tables(x.shape[1], x).turn(x, x))
        return query @ key.transpose(-1, -2)

    torch.testing.assert_close(scores(x), scores(shifted)[..., 3:, 3:], rtol=1e-12, atol=1e-12)


def test_attention_dropout_acts_in_training_only():
    layer = ParallelAttention(16, 4, dropout=0.5).double()
    x = torch.randn(2, 6, 16).double()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), plain_attention(layer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((10, 4), r"dim=10 must be an even multiple of num_heads=4"),
        ((12, 4), r"dim=12 must be an even multiple of num_heads=4"),
        ((16, 4, 3), r"num_heads=4 is not divisible by num_kv_heads=3"),
    ],
)
def test_attention_sizes_that_do_not_divide_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        ParallelAttention(*sizes)


# --- what cannot be sharded says so

FOUR = Layout(8, tensor=4, expert_tensor=4)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            lambda: ColumnParallelLinear(4, 6),
            "out_features=6 is not divisible by tensor_parallel_size=4; legal sizes on 8 ranks: 1, 2",
        ),
        (
            lambda: RowParallelLinear(6, 4),
            "in_features=6 is not divisible by tensor_parallel_size=4; legal sizes on 8 ranks: 1, 2",
        ),
        (
            lambda: ParallelMLP(4, 6),
            "hidden_dim=6 is not divisible by tensor_parallel_size=4; legal sizes on 8 ranks: 1, 2",
        ),
        (
            lambda: ParallelAttention(12, 6),
            "num_heads=6 is not divisible by tensor_parallel_size=4; legal sizes on 8 ranks: 1, 2",
        ),
        (
            lambda: ParallelAttention(16, 8, 2),
            "num_kv_heads=2 is not divisible by tensor_parallel_size=4; legal sizes on 8 ranks: 1, 2",
        ),
    ],
)
def test_check_names_layer_option_and_legal_sizes(layer, message):
    with pytest.raises(ValueError, match=f"^blocks.3: {message}$"):
        layer().check("blocks.3", FOUR)


def test_check_accepts_what_divides_and_any_vocabulary():
    for layer in (
        ColumnParallelLinear(3, 8),
        RowParallelLinear(8, 3),
        ParallelMLP(3, 8),
        ParallelAttention(16, 8, 4),
        VocabParallelEmbedding(61, 3),
        VocabParallelHead(3, 61),
        VocabParallelCrossEntropy(),
    ):
        with case(type(layer).__name__):
            layer.check("layer", FOUR)
