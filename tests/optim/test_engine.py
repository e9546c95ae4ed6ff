"""The engine drives the user's own optimizer, and leaves it as it was."""

import pytest
import torch
from helpers.optimizer_alone import SignDescent, backward, equal, pair
from torch import nn

from lightning_tex.optim.engine import Engine, fastest
from lightning_tex.optim.formats import Window


def test_a_third_partys_elementwise_optimizer_is_driven():
    ours, optimizer, theirs, plain = pair(SignDescent)
    for step in range(5):
        for model, each in ((ours, optimizer), (theirs, plain)):
            each.zero_grad()
            backward(model, step)
            each.step()
        equal(ours, theirs)


class ClosureRequired(torch.optim.AdamW):
    def step(self, closure):
        return super().step() if closure is None else closure()


def test_a_step_that_requires_a_closure_is_driven():
    ours, optimizer, theirs, plain = pair(lambda parameters: ClosureRequired(parameters, lr=0.01))
    backward(ours, 0)
    optimizer.step()
    backward(theirs, 0)
    plain.step(None)
    equal(ours, theirs)


def test_engine_leaves_the_users_optimizer_untouched():
    p = nn.Parameter(torch.ones(4))
    users = torch.optim.AdamW([p], lr=0.1)
    called = []
    users.register_step_post_hook(lambda *_: called.append("hook"))
    torch.optim.lr_scheduler.StepLR(users, 1)  # patches the instance's step
    groups_before, step_before = [dict(g) for g in users.param_groups], users.step
    window = nn.Parameter(torch.full((4,), 2.0))
    engine, state = Engine(users), {}
    for _ in range(2):
        engine.step([Window(window, state)], [torch.ones(4)], fastest(users, users.param_groups[0]))
    assert [dict(g) for g in users.param_groups] == groups_before
    assert users.step is step_before
    assert not users.state and not called
    assert p.grad is None and torch.equal(p, torch.ones(4))
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"} and window.grad is None

    plain = nn.Parameter(torch.full((4,), 2.0))
    reference = torch.optim.AdamW([plain], lr=0.1)
    for _ in range(2):
        plain.grad = torch.ones(4)
        reference.step()
    torch.testing.assert_close(window, plain)


class ConstructedStates(torch.optim.Optimizer):
    """Adagrad's arithmetic, with states that only the constructor makes, as torch's own before 2.13."""

    def __init__(self, params, lr=0.1, start=0.5):
        super().__init__(params, {"lr": lr, "start": start})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sum"] = torch.full_like(p, group["start"])

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    total = self.state[p]["sum"].addcmul_(p.grad, p.grad)
                    p.addcdiv_(p.grad, total.sqrt(), value=-group["lr"])


def test_states_that_only_a_constructor_makes_are_made_for_windows():
    ours, optimizer, theirs, plain = pair(lambda p: ConstructedStates(p, lr=0.05, start=0.25))
    for step in range(3):
        for model, each in ((ours, optimizer), (theirs, plain)):
            each.zero_grad()
            backward(model, step)
            each.step()
        equal(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"fused": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sgd_steps_all_16_bit_numbers(options, dtype):
    # torch's fused kernel of CPUs steps those alone that its vectors leave over.
    ours, optimizer, theirs, plain = pair(lambda p: torch.optim.SGD(p, lr=0.05, **options), tile_size=1000, dtype=dtype)
    plain.param_groups[0]["fused"] = False
    before = [p.clone() for p in ours.parameters()]
    for step in range(2):
        for model, each in ((ours, optimizer), (theirs, plain)):
            each.zero_grad()
            backward(model, step)
            each.step()
    equal(ours, theirs, tolerance=0.02)
    assert all(bool((p != q).float().mean() > 0.5) for p, q in zip(ours.parameters(), before, strict=True))


def test_fused_is_chosen_where_the_user_left_it_open():
    p = [nn.Parameter(torch.zeros(2))]

    def chosen(optimizer):
        return fastest(optimizer, optimizer.param_groups[0]).get("fused")

    assert chosen(torch.optim.AdamW(p)) is True
    assert not chosen(torch.optim.AdamW(p, foreach=True))
    assert not chosen(torch.optim.AdamW(p, fused=False))
    assert not chosen(torch.optim.RMSprop(p))
    assert "params" not in fastest(torch.optim.SGD(p), {"params": p, "lr": 1})
