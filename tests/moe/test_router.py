import re

import pytest
import torch

from lightning_tex.moe import MoE, Route, Router, SigmoidRouter, SoftmaxRouter, Tokens
from lightning_tex.parallel.layout import Layout


class Sigmoid(Router):
    def score(self, logits):
        return logits.sigmoid()


class Cyclic(Router):
    """Token t goes to experts t, t + 1, .. with weight 1/2: a router with a forward of its own."""

    def forward(self, x, tokens=None):
        first = torch.arange(len(x))[:, None]
        indices = (first + torch.arange(self.top_k)) % self.num_experts
        scores = x.new_full((len(x), self.num_experts), 1 / self.num_experts)
        return Route(indices, torch.full(indices.shape, 0.5, dtype=x.dtype), scores, scores)


def test_softmax_router_decides_as_written_by_hand():
    torch.manual_seed(0)
    router = SoftmaxRouter(4, 5, top_k=3)
    x = torch.randn(7, 4)
    route = router(x)
    for t in range(7):
        logits = [sum((router.weight[e, d] * x[t, d]).item() for d in range(4)) for e in range(5)]
        exp = [2.718281828459045**z for z in logits]
        scores = [e / sum(exp) for e in exp]
        best = sorted(range(5), key=lambda e, s=scores: -s[e])[:3]
        assert route.indices[t].tolist() == best
        torch.testing.assert_close(route.weights[t], torch.tensor([scores[e] for e in best]))
        torch.testing.assert_close(route.scores[t], torch.tensor(scores))
        torch.testing.assert_close(route.logits[t], torch.tensor(logits))


def test_normalised_weights_sum_to_one_and_masked_ones_are_zero():
    torch.manual_seed(0)
    router = SoftmaxRouter(4, 5, top_k=2, norm_topk_prob=True)
    mask = torch.tensor([True, False, True])
    route = router(torch.randn(3, 4), Tokens(mask))
    torch.testing.assert_close(route.weights.sum(-1), mask.float())
    after_the_choice = route.logits.gather(-1, route.indices.clamp(max=4)).softmax(-1)
    torch.testing.assert_close(route.weights[mask], after_the_choice[mask])
    assert route.indices[1].tolist() == [5, 5]
    assert (route.indices[mask] < 5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_router_computes_in_at_least_fp32_even_under_autocast(dtype):
    torch.manual_seed(0)
    router = SoftmaxRouter(8, 4, top_k=2)
    x = torch.randn(6, 8).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        route = router(x)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert route.logits.dtype == route.scores.dtype == route.weights.dtype == wide
    torch.testing.assert_close(route.logits, x.to(wide) @ router.weight.to(wide).T)


def test_weights_have_a_gradient_and_indices_have_none():
    router = SoftmaxRouter(4, 5, top_k=2).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    route = router(x)
    assert not route.indices.requires_grad
    route.weights[:, 0].sum().backward()
    weight = router.weight.detach().clone().requires_grad_()
    (x @ weight.T).softmax(-1).amax(-1).sum().backward()
    torch.testing.assert_close(router.weight.grad, weight.grad)


@pytest.mark.parametrize("router", [Sigmoid, Sigmoid(4, 3, 2), "softmax", SoftmaxRouter(4, 3, 2)])
def test_a_router_may_be_a_name_a_class_or_an_instance(router):
    torch.manual_seed(0)
    layer = MoE(4, 8, 3, top_k=2, router=router).double().eval()
    x = torch.randn(5, 4, dtype=torch.float64)
    logits = x @ layer.router.weight.T
    scores = logits.softmax(-1) if isinstance(layer.router, SoftmaxRouter) else 1 / (1 + torch.exp(-logits))
    expected = torch.zeros_like(x)
    for t in range(5):
        for e in scores[t].argsort(descending=True)[:2].tolist():
            hidden = torch.nn.functional.gelu(layer.experts.up[e] @ x[t])
            expected[t] += scores[t, e] * (layer.experts.down[e] @ hidden)
    torch.testing.assert_close(layer(x), expected)
    if isinstance(router, Router):
        assert layer.router is router


def test_a_router_may_replace_all_of_forward():
    layer = MoE(4, 8, 3, top_k=2, router=Cyclic).double().eval()
    x = torch.randn(5, 4, dtype=torch.float64)
    y = layer(x)
    for t in range(5):
        expected = sum(
            0.5 * layer.experts.down[e] @ torch.nn.functional.gelu(layer.experts.up[e] @ x[t])
            for e in (t % 3, (t + 1) % 3)
        )
        torch.testing.assert_close(y[t], expected)


def test_forced_balance_serves_all_experts_alike_with_gradients_of_the_weights():
    torch.manual_seed(0)
    layer = MoE(4, 8, 6, top_k=3, router="forced_balance", norm_topk_prob=True).double().eval()
    with torch.no_grad():
        layer.router.weight[0] += 2  # which most would choose
    x = torch.randn(10, 4, dtype=torch.float64)
    route = layer.router(x)
    assert torch.bincount(route.indices.flatten(), minlength=6).tolist() == [5] * 6
    assert all(len(set(chosen)) == 3 for chosen in route.indices.tolist())
    torch.testing.assert_close(route.weights.sum(-1), torch.ones(10, dtype=torch.float64))
    layer(x).square().sum().backward()
    assert layer.router.weight.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"router": "roulette"},
            "router='roulette'; legal: 'softmax', 'sigmoid', 'switch', 'gshard', 'sparsemixer', 'sinkhorn', 'hash', "
            "'expert_choice', 'forced_balance', or a Router class",
        ),
        (
            {"router": SoftmaxRouter(4, 5, 2), "top_k": 2},
            "router is made for dim=4, num_experts=5, top_k=2; the MoE layer has dim=4, num_experts=6, top_k=2",
        ),
        ({"top_k": 7}, "top_k=7 must be between 1 and num_experts=6"),
        ({"top_k": 0}, "top_k=0 must be between 1 and num_experts=6"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0 must be positive, or None for dropless routing"),
        ({"activation": "tanh"}, "activation='tanh'; legal: 'gelu', "),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MoE(4, 8, 6, **options)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            Layout(8, 1, 4, 1),
            "mlp: num_experts=6 is not divisible by expert_parallel_size=4; legal sizes on 8 ranks",
        ),
        (Layout(8, 4, 2, 4), "mlp: hidden_dim=10 is not divisible by expert_tensor_parallel_size=4"),
    ],
)
def test_check_names_what_cannot_be_sharded(layout, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MoE(4, 10, 6).check("mlp", layout)
    MoE(4, 10, 6).check("mlp", Layout(8, 4, 2, 1))
    MoE(4, 10, 6).check("mlp", Layout(8, 2, 2, 2))


def chosen_by_hand(scores, bias, groups, topk_group, top_k, best_of_group):
    """The choices of one token, by the definition: groups by their best experts, then experts within them."""
    size = len(scores) // groups
    wanted = [score + b for score, b in zip(scores, bias, strict=True)]
    of_group = [sum(sorted(wanted[g * size : (g + 1) * size])[-best_of_group:]) for g in range(groups)]
    legal = sorted(range(groups), key=lambda g: -of_group[g])[:topk_group]
    inside = [e for g in legal for e in range(g * size, (g + 1) * size)]
    return sorted(inside, key=lambda e: -wanted[e])[:top_k]


@pytest.mark.parametrize("kind", [SoftmaxRouter, SigmoidRouter])
def test_groups_biases_and_scaling_by_hand(kind):
    torch.manual_seed(0)
    router = kind(4, 12, 3, norm_topk_prob=True, bias=True, routed_scaling_factor=2.5, n_group=4, topk_group=2).double()
    x = torch.randn(20, 4, dtype=torch.float64)
    correction = torch.zeros(12, dtype=torch.float64)
    if kind is SigmoidRouter:
        correction = router.correction_bias.copy_(0.3 * torch.randn(12))
    route = router(x)
    logits = x @ router.weight.T + router.bias
    scores = logits.sigmoid() if kind is SigmoidRouter else logits.softmax(-1)
    torch.testing.assert_close(route.scores, scores / scores.sum(-1, keepdim=True))
    unlimited = 0
    for t in range(20):
        best = 2 if kind is SigmoidRouter else 1
        expected = chosen_by_hand(scores[t].tolist(), correction.tolist(), 4, 2, 3, best)
        assert route.indices[t].tolist() == expected
        weights = torch.stack([scores[t, e] for e in expected])
        torch.testing.assert_close(route.weights[t], 2.5 * weights / weights.sum())
        unlimited += expected == chosen_by_hand(scores[t].tolist(), correction.tolist(), 1, 1, 3, best)
    assert unlimited < 20  # the groups decide


def test_a_router_may_be_a_name_with_arguments_or_an_import_path():
    layer = MoE(4, 8, 6, 2, router={"name": "sigmoid", "init_args": {"routed_scaling_factor": 2.0}})
    assert isinstance(layer.router, SigmoidRouter) and layer.router.routed_scaling_factor == 2
    layer.router.correction_bias.fill_(1 + 2**-20)
    assert (layer.bfloat16().state_dict()["router.correction_bias"] == 1 + 2**-20).all()
    assert type(MoE(4, 8, 6, router="lightning_tex.moe.SigmoidRouter").router) is SigmoidRouter


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"name": "sigmoid", "arguments": {}}, r"router has 'arguments'; legal: name, and init_args"),
        ({"init_args": {}}, "router has no name; legal"),
        ({"name": "sigmoid", "init_args": {"groups": 2}}, "router SigmoidRouter: .*'groups'"),
        ("no.such.Router", "router='no.such.Router'; legal: 'softmax', 'sigmoid'"),
        (
            {"name": "softmax", "init_args": {"n_group": 4}},
            "n_group=4 does not divide num_experts=6; legal: 1, 2, 3, 6",
        ),
        (
            {"name": "softmax", "init_args": {"n_group": 6, "topk_group": 1}},
            "topk_group=1 of n_group=6 .*legal: 2 to 6",
        ),
        ({"name": "sigmoid", "init_args": {"n_group": 6}}, "group_score='top2_sum' .*legal: n_group of at most 3"),
    ],
)
def test_routers_that_there_cannot_be_are_refused(router, message):
    with pytest.raises((ValueError, TypeError), match=message):
        MoE(4, 8, 6, 2, router=router)


def test_sparsemixer_by_hand():
    """Phi-MoE's: of each choice the softmax among what is left and not far below it."""
    torch.manual_seed(0)
    router = MoE(4, 8, 6, 2, router={"name": "sparsemixer", "init_args": {"jitter_eps": 0.2}}).double().router
    x = torch.randn(30, 4, dtype=torch.float64)
    route = router(x)
    seen = set()
    for t, logits in enumerate((x @ router.weight.T).tolist()):
        left = dict(enumerate(logits))
        for choice, weight in zip(route.indices[t].tolist(), route.weights[t].tolist(), strict=True):
            best = max(left, key=left.get)
            near = [e for e in left if (left[best] - left[e]) / max(abs(left[e]), left[best]) <= 0.4]
            assert choice == best
            assert weight == pytest.approx(1 / sum(2.718281828459045 ** (left[e] - left[best]) for e in near))
            seen.add(len(near))
            del left[best]
    assert len(seen) > 2
