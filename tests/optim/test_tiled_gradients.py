"""Gradients of the tiled optimizer in one process: views, accumulation and clipping are those of the plain one."""

import pytest
import torch
from helpers.optimizer_alone import KINDS, backward, equal, network, pair, tiled


def views(optimizer):
    return [(e.parameter, view) for shard in optimizer.shards for e, view in shard.gradients.views.items()]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_views_of_the_buffer_from_the_backward_to_zero_grad(set_to_none):
    model = network()
    optimizer = tiled(model, torch.optim.SGD(model.parameters(), lr=0.1))
    backward(model, 0)
    assert all(p.grad is view and view.any() for p, view in views(optimizer))
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is (None if set_to_none else view) and not view.any() for p, view in views(optimizer))


def test_gradients_put_elsewhere_by_the_modules_zero_grad_are_collected():
    ours, optimizer, theirs, plain = pair(KINDS["AdamW"])
    for step in range(3):
        for model, each in ((ours, optimizer), (theirs, plain)):
            model.zero_grad()
            backward(model, step)
            each.step()
        equal(ours, theirs)
    assert all(p.grad is view for p, view in views(optimizer))


def test_gradients_of_several_backwards_accumulate():
    ours, optimizer, theirs, plain = pair(KINDS["SGD momentum"])
    for step in range(3):
        for model, each in ((ours, optimizer), (theirs, plain)):
            each.zero_grad()
            for micro in range(3):
                backward(model, 3 * step + micro)
            each.step()
        equal(ours, theirs)


def test_a_parameter_without_gradient_counts_as_gradient_zero():
    ours, optimizer, theirs, plain = pair(KINDS["AdamW"])
    for step in range(3):
        for model, each in ((ours, optimizer), (theirs, plain)):
            model.zero_grad()
            backward(model, step)
            model[0].weight.grad = None if model is ours else torch.zeros_like(model[0].weight)
            each.step()
        equal(ours, theirs)
    assert not torch.equal(ours[0].weight, network()[0].weight)  # it decays


def test_a_closure_runs_with_gradients_before_the_step_and_its_result_is_given():
    ours, optimizer, theirs, plain = pair(KINDS["SGD"])

    def closure():
        optimizer.zero_grad()
        assert torch.is_grad_enabled()
        backward(ours, 0)
        return 42

    assert optimizer.step(closure) == 42
    backward(theirs, 0)
    plain.step()
    equal(ours, theirs)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_by_norm(max_norm):
    ours, optimizer, theirs, plain = pair(KINDS["SGD momentum"])
    for step in range(3):
        optimizer.zero_grad()
        plain.zero_grad()
        backward(ours, step)
        backward(theirs, step)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        norm = optimizer.clip_by_norm(max_norm)
        torch.testing.assert_close(norm, expected)
        torch.testing.assert_close(optimizer.gradient_norm(), expected.clamp(max=max_norm), rtol=1e-5, atol=0)
        optimizer.step()
        plain.step()
        equal(ours, theirs)


def test_clipping_by_value_also_after_clipping_by_norm():
    ours, optimizer, theirs, plain = pair(KINDS["SGD"])
    for step in range(3):
        optimizer.zero_grad()
        plain.zero_grad()
        backward(ours, step)
        backward(theirs, step)
        if step:
            optimizer.clip_by_norm(2.0)
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 2.0)
        optimizer.clip_by_value(0.05)
        torch.nn.utils.clip_grad_value_(theirs.parameters(), 0.05)
        optimizer.step()
        plain.step()
        equal(ours, theirs)


@pytest.mark.parametrize("clip", ["value", "norm", "norm and value"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_without_a_guard_clipping_does_to_infinities_what_torch_does(bad, clip):
    ours, optimizer, theirs, plain = pair(KINDS["SGD"])
    for model, each in ((ours, optimizer), (theirs, plain)):
        each.zero_grad()
        backward(model, 0)
        model[0].weight.grad[0, 0] = bad
    if "norm" in clip:
        optimizer.clip_by_norm(0.5)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    if "value" in clip:
        optimizer.clip_by_value(0.05)
        torch.nn.utils.clip_grad_value_(theirs.parameters(), 0.05)
    assert not optimizer.gradients_are_finite()
    optimizer.step()
    plain.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12, equal_nan=True)
