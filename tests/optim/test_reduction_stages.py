"""The order of a step's calls: what is out of order is refused by name, and zero_grad begins anew from everywhere."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from helpers.backwards import announced_backward
from helpers.optimizer_alone import equal, network, tiled
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from lightning_tex.optim import ReductionStage, TiledOptimizer

Calls = Callable[[nn.Module, TiledOptimizer], None]


def loss_of(model: nn.Module) -> Tensor:
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return model(x).square().sum()


def made(zero_stage: int, wrapped: bool = False) -> tuple[nn.Module, TiledOptimizer]:
    model = network()
    optimizer = tiled(model, torch.optim.SGD(model.parameters(), lr=0.01), zero_stage=zero_stage)
    return model, LightningOptimizer(optimizer) if wrapped else optimizer  # type: ignore[return-value]


def begin(model: nn.Module, optimizer: TiledOptimizer, last: bool = False) -> None:
    optimizer.backward_begins(loss_of(model), last=last)


def end(model: nn.Module, optimizer: TiledOptimizer, last: bool = False) -> None:
    announced_backward(optimizer, loss_of(model), last=last)


LEADS_TO: dict[ReductionStage, Calls] = {
    ReductionStage.COLLECTING: lambda model, optimizer: None,
    ReductionStage.IN_BACKWARD: begin,
    ReductionStage.IN_LAST_BACKWARD: lambda model, optimizer: begin(model, optimizer, last=True),
    ReductionStage.SENT: end,  # under zero_stage=2
    ReductionStage.COMPLETE: lambda model, optimizer: end(model, optimizer, last=True),
    ReductionStage.COMBINED: lambda model, optimizer: optimizer.reduce_gradients(),
    ReductionStage.UNSCALED: lambda model, optimizer: optimizer.unscale(0.5),
}
IN_A_BACKWARD = {ReductionStage.IN_BACKWARD, ReductionStage.IN_LAST_BACKWARD}
CALLS: dict[str, tuple[Calls, set[ReductionStage]]] = {  # with the stages in which they are refused
    "backward_begins": (
        begin,
        IN_A_BACKWARD | {ReductionStage.COMPLETE, ReductionStage.COMBINED, ReductionStage.UNSCALED},
    ),
    "backward_ended": (lambda model, optimizer: optimizer.backward_ended(), set(ReductionStage) - IN_A_BACKWARD),
    "combining the gradients": (lambda model, optimizer: optimizer.reduce_gradients(), IN_A_BACKWARD),
    "unscale": (lambda model, optimizer: optimizer.unscale(0.5), IN_A_BACKWARD | {ReductionStage.UNSCALED}),
}


@pytest.mark.parametrize("wrapped", [False, True], ids=["optimizer", "LightningOptimizer"])
@pytest.mark.parametrize("stage", ReductionStage, ids=lambda stage: stage.name)
@pytest.mark.parametrize("call", CALLS)
def test_what_is_out_of_order_is_refused_by_name(call: str, stage: ReductionStage, wrapped: bool) -> None:
    model, optimizer = made(2, wrapped)
    LEADS_TO[stage](model, optimizer)
    assert optimizer.reduction_stage is stage
    function, refused = CALLS[call]
    if stage not in refused:
        function(model, optimizer)
        return
    with pytest.raises(RuntimeError) as error:
        function(model, optimizer)
    assert str(error.value) == f"{call}: {stage.said}; legal now: {stage.legal}"
    assert optimizer.reduction_stage is stage, "a refusal changes nothing"


@pytest.mark.parametrize("use", ["gradient_norm", "gradients_are_finite", "clip_by_norm", "clip_by_value", "step"])
@pytest.mark.parametrize("last", [False, True])
def test_gradients_are_not_used_inside_a_backward(use: str, last: bool) -> None:
    model, optimizer = made(1)
    begin(model, optimizer, last)
    with pytest.raises(RuntimeError, match=r"combining the gradients: .* has begun and not ended"):
        getattr(optimizer, use)(*([1.0] if "clip" in use else []))


@pytest.mark.parametrize("wrapped", [False, True], ids=["optimizer", "LightningOptimizer"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2])
@pytest.mark.parametrize("stage", ReductionStage, ids=lambda stage: stage.name)
def test_zero_grad_begins_a_step_from_every_stage(stage: ReductionStage, zero_stage: int, wrapped: bool) -> None:
    (model, optimizer), (fresh, plain) = made(zero_stage, wrapped), made(zero_stage)
    LEADS_TO[stage](model, optimizer)
    optimizer.zero_grad()
    assert optimizer.reduction_stage is ReductionStage.COLLECTING
    for trained, its in ((model, optimizer), (fresh, plain)):
        announced_backward(its, loss_of(trained), last=True)
        its.clip_by_norm(0.5)
        TiledOptimizer.step(its)  # the wrapper's needs a strategy
        assert its.reduction_stage is ReductionStage.COLLECTING
    equal(model, fresh, tolerance=0)
    assert not torch.equal(model[0].weight, network()[0].weight)


def test_a_backward_that_fails_is_given_up_by_zero_grad() -> None:
    (model, optimizer), (fresh, plain) = made(1), made(1)
    hook = model[0].weight.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        announced_backward(optimizer, loss_of(model), last=True, undisturbed=True)
    hook.remove()
    with pytest.raises(RuntimeError, match=r"has begun and not ended, or has failed; legal now: .*zero_grad"):
        optimizer.step()
    for trained, its in ((model, optimizer), (fresh, plain)):
        its.zero_grad()
        announced_backward(its, loss_of(trained), last=True, undisturbed=True)
        its.step()
    equal(model, fresh, tolerance=0)


def test_a_backward_after_gradients_have_left_is_refused() -> None:
    model, optimizer = made(1)
    announced_backward(optimizer, loss_of(model), last=True, undisturbed=True)
    with pytest.raises(RuntimeError, match=r"arrived after it was reduced: .* after the last one of a step"):
        loss_of(model).backward()


def test_it_goes_by_the_name_of_the_users_optimizer() -> None:
    (_, first), (_, second) = made(1), made(2)
    assert isinstance(first, TiledOptimizer) and type(first).__name__ == "SGD"
    assert type(first) is type(second), "one class for each name"
    assert type(LightningOptimizer(first)).__name__ == "LightningSGD"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_that_would_have_no_states_is_refused(copied: Callable[[TiledOptimizer], object]) -> None:
    with pytest.raises(RuntimeError, match=r"can be neither copied nor pickled; trainer\.save_checkpoint"):
        copied(made(1)[1])


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_zero_grad_in_a_hook_before_the_backward_is_legal(zero_stage: int, last: bool) -> None:
    model, optimizer = made(zero_stage)
    plain = network()
    loss_of(plain).backward()
    loss = loss_of(model)
    optimizer.backward_begins(loss, last=last)
    optimizer.zero_grad()
    loss.backward()
    optimizer.backward_ended()
    optimizer.step()
    torch.optim.SGD(plain.parameters(), lr=0.01).step()
    equal(model, plain)
    with pytest.raises(RuntimeError, match="backward_ended: no backward is under way"):
        optimizer.backward_ended()
