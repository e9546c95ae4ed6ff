"""The tiled optimizer in one process against the plain torch optimizer, with tiles that cut through parameters."""

import copy

import pytest
import torch
from helpers.optimizer_alone import KINDS, SignDescent, backward, equal, network, pair, tiled
from jsonargparse import ArgumentParser
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_tex.optim import TiledOptimizer
from lightning_tex.optim.engine import Engine, fastest
from lightning_tex.optim.formats import Window
from lightning_tex.optim.probe import probe


def probe_all(optimizer):
    for group in optimizer.param_groups:
        probe(optimizer, group)


@pytest.mark.parametrize("tile_size", [64, 128, None])
@pytest.mark.parametrize("kind", KINDS)
def test_five_steps_are_those_of_the_plain_optimizer(kind, tile_size):
    ours, optimizer, theirs, plain = pair(KINDS[kind], tile_size)
    if tile_size:
        spans = optimizer.shards[0].states.spans
        assert len(spans) > 5 and all(span.stop - span.start <= tile_size for span in spans)
    start = copy.deepcopy(ours)
    for step in range(5):
        for model, each in ((ours, optimizer), (theirs, plain)):
            each.zero_grad()
            backward(model, step)
            each.step()
        equal(ours, theirs)
    assert not torch.equal(start[0].weight, ours[0].weight)


@pytest.mark.parametrize("kind", ["AdamW", "SGD momentum"])
def test_fp32_steps_are_those_of_the_plain_fused_optimizer_to_rounding(kind):
    ours, optimizer, theirs, plain = pair(KINDS[kind], 64, torch.float32)
    plain.param_groups[0]["fused"] = True
    for step in range(5):
        for model, each in ((ours, optimizer), (theirs, plain)):
            each.zero_grad()
            backward(model, step)
            each.step()
    equal(ours, theirs, 1e-6)


LOOPS = {"fused": None, "loop": {"fused": False, "foreach": False}, "foreach": {"foreach": True}}


@pytest.mark.parametrize("way", LOOPS)
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_change_no_bit(kind, way):
    sizes = (64, 128, 192, 1 << 20, None) if way == "fused" else (1, 7, 1000, 1 << 20, None)
    results = []
    for tile_size in sizes:
        model = network(torch.float32)
        users = KINDS[kind](model.parameters())
        users.param_groups[0].update(LOOPS[way] or {})
        optimizer = tiled(model, users, tile_size)
        for step in range(3):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert all(torch.equal(result, results[0]) for result in results)


def groups(model):
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": decayed, "weight_decay": 0.3, "lr": 0.02}, {"params": rest, "betas": (0.5, 0.6)}]


def test_groups_have_their_own_options_and_learning_rates_are_live():
    ours = network()
    theirs = copy.deepcopy(ours)
    users = torch.optim.AdamW(groups(ours), lr=0.05, weight_decay=0.0)
    optimizer, plain = tiled(ours, users), torch.optim.AdamW(groups(theirs), lr=0.05, weight_decay=0.0)
    schedulers = [torch.optim.lr_scheduler.StepLR(each, 2, 0.1) for each in (users, plain)]
    for step in range(6):
        for model, each, scheduler in ((ours, optimizer, schedulers[0]), (theirs, plain, schedulers[1])):
            each.zero_grad()
            backward(model, step)
            each.step()
            scheduler.step()
            if step == 3:
                each.param_groups[1]["lr"] *= 7
                each.param_groups[0]["weight_decay"] = 0.9
        equal(ours, theirs)
    assert optimizer.param_groups is users.param_groups
    assert users.param_groups[1]["lr"] != 0.05


def test_a_group_added_later_is_stepped():
    ours, theirs = network(), network()
    pairs = []
    for model in (ours, theirs):
        each = torch.optim.AdamW(list(model[0].parameters()), lr=0.01)
        if model is ours:
            each = tiled(model, each)
        pairs.append((model, each))
    for step in range(4):
        for model, each in pairs:
            if step == 2:
                late = [*model[2].parameters(), *model[3].parameters()]
                each.add_param_group({"params": late, "lr": 0.3})
            each.zero_grad()
            for p in model.parameters():
                p.grad = None if p.grad is None else p.grad.zero_()
            backward(model, step)
            each.step()
        equal(ours, theirs)
    optimizer = pairs[0][1]
    assert len(optimizer.param_groups) == len(optimizer.inner.param_groups) == 2
    assert optimizer.param_groups[1] is optimizer.inner.param_groups[1]
    assert {shard.group["lr"] for shard in optimizer.shards} == {0.01, 0.3}


def test_groups_without_anything_to_step():
    ours, theirs = network(), network()
    optimizers = []
    for model in (ours, theirs):
        model[2].requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [[], list(model[2].parameters()), trained, []]
        optimizers.append(torch.optim.AdamW([{"params": group} for group in groups], lr=1e-2))
    optimizer = tiled(ours, optimizers[0])
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 2, 3, 0]
    for step in range(3):
        for model, each in ((ours, optimizer), (theirs, optimizers[1])):
            each.zero_grad()
            backward(model, step)
        optimizer.clip_by_norm(0.1)
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        optimizer.step()
        optimizers[1].step()
    equal(ours, theirs, 1e-10)


def test_frozen_parameters_stay_and_foreign_ones_are_refused():
    model = network()
    model[0].weight.requires_grad_(False)
    kept = model[0].weight.clone()
    optimizer = tiled(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    backward(model, 0)
    optimizer.step()
    assert torch.equal(model[0].weight, kept)
    with pytest.raises(ValueError, match=r"a parameter of shape \(3,\) that is not a parameter of the LightningModule"):
        tiled(model, torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(3))], lr=0.1))


# --- gradients


def views(optimizer):
    return [(e.parameter, view) for shard in optimizer.shards for e, view in shard.gradients.views.items()]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_keeps_views_of_the_buffer(set_to_none):
    model = network()
    optimizer = tiled(model, torch.optim.SGD(model.parameters(), lr=0.1))
    backward(model, 0)
    assert all(p.grad is view and view.any() for p, view in views(optimizer))
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is view and not view.any() for p, view in views(optimizer))


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


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_without_a_guard_clipping_does_to_infinities_what_torch_does(bad):
    for clip in ("value", "norm", "norm and value"):
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


# --- low precision and what others write


def values(piece):
    with piece.shard.states.window(piece.window) as window:
        return window.tile.detach()[piece.held.slices].clone()


def test_bf16_parameters_have_an_fp32_master():
    model = network(torch.bfloat16)
    optimizer = tiled(model, torch.optim.SGD(model.parameters(), lr=2**-9, momentum=0.5))
    masters = [p.detach().float() for p in model.parameters()]
    momenta = [torch.zeros_like(m) for m in masters]
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        optimizer.zero_grad()
        for i, p in enumerate(model.parameters()):
            gradient = torch.randn(p.shape, generator=generator).bfloat16()
            p.grad.copy_(gradient)
            momenta[i] = 0.5 * momenta[i] + gradient.float()
            masters[i] = masters[i] - 2**-9 * momenta[i]
        optimizer.step()
        for p, master in zip(model.parameters(), masters, strict=True):
            assert p.dtype == torch.bfloat16
            torch.testing.assert_close(p, master.bfloat16(), rtol=0, atol=0)
    held = {id(piece.entry.parameter): [] for piece in optimizer.pieces()}
    for piece in optimizer.pieces():
        held[id(piece.entry.parameter)].append(values(piece))
    for p, master in zip(model.parameters(), masters, strict=True):
        torch.testing.assert_close(torch.cat(held[id(p)]).view_as(p), master, rtol=0, atol=1e-7)
    # Two steps too small for bf16 to see add up in the master only.
    assert any(not torch.equal(master, p.float()) for p, master in zip(model.parameters(), masters, strict=True))


def test_bf16_adamw_is_the_plain_one_on_the_master():
    model = network(torch.bfloat16)
    optimizer = tiled(model, KINDS["AdamW"](model.parameters()))
    wide = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    plain = KINDS["AdamW"](wide)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        for q, p in zip(wide, model.parameters(), strict=True):
            q.grad = p.grad.float()
        optimizer.step()
        plain.step()
        for p, q in zip(model.parameters(), wide, strict=True):
            torch.testing.assert_close(p, q.bfloat16(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_loaded_between_steps_are_taken_up(dtype):
    model = network(dtype)
    optimizer = tiled(model, torch.optim.SGD(model.parameters(), lr=0.5))
    backward(model, 0)
    optimizer.step()
    loaded = {name: torch.randn_like(t) for name, t in model.state_dict().items()}
    model.load_state_dict(loaded)
    optimizer.zero_grad()
    for p in model.parameters():
        p.grad.fill_(1.0)
    optimizer.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, (loaded[name].double() - 0.5).to(dtype), rtol=0, atol=0)


def test_pieces_cover_every_element_once():
    model = network()
    optimizer = tiled(model, torch.optim.AdamW(groups(model)))
    rebuilt = {p: torch.full((p.numel(),), float("nan"), dtype=p.dtype) for p in model.parameters()}
    seen = 0
    for piece in optimizer.pieces():
        assert rebuilt[piece.entry.parameter][piece.stored.slices].isnan().all()
        rebuilt[piece.entry.parameter][piece.stored.slices] = values(piece)
        seen += piece.stored.numel
    assert seen == sum(p.numel() for p in model.parameters())
    assert all(torch.equal(values, p.flatten()) for p, values in rebuilt.items())


# --- the engine and its probe


class TrustRatio(Optimizer):
    """LARS: each tensor's step is scaled by its own norm."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad * p.norm() / p.grad.norm() * group["lr"])


def test_a_third_partys_elementwise_optimizer_is_driven():
    ours, optimizer, theirs, plain = pair(SignDescent)
    for step in range(5):
        for model, each in ((ours, optimizer), (theirs, plain)):
            each.zero_grad()
            backward(model, step)
            each.step()
        equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_elementwise_optimizers_pass_the_probe(kind):
    probe_all(KINDS[kind]([nn.Parameter(torch.zeros(4))]))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (torch.optim.LBFGS, "optimizer LBFGS calls its closure 2 times in one step"),
        (torch.optim.Adafactor, "optimizer Adafactor is not elementwise"),
        (TrustRatio, "optimizer TrustRatio is not elementwise: a random matrix stepped whole and in windows differ by"),
    ],
)
def test_others_are_refused(kind, message):
    model = network(torch.float32)
    with pytest.raises(ValueError, match=message):
        tiled(model, kind(model.parameters()))


def test_the_probe_looks_at_every_groups_options():
    class Sometimes(TrustRatio):
        def step(self, closure=None):
            if self.param_groups[0].get("trust"):
                super().step()

    first, second = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    probe_all(Sometimes([first, second]))
    with pytest.raises(ValueError, match="Sometimes is not elementwise"):
        probe_all(Sometimes([{"params": [first]}, {"params": [second], "trust": True}]))


@pytest.mark.parametrize("lr", [0.0, 1e-9, torch.tensor(0.0)])
def test_a_warm_up_from_nothing_does_not_hide_from_the_probe(lr):
    with pytest.raises(ValueError, match="TrustRatio is not elementwise"):
        probe_all(TrustRatio([nn.Parameter(torch.zeros(4))], lr=lr))
    probe_all(torch.optim.AdamW([nn.Parameter(torch.zeros(4))], lr=0.0))


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
        engine.step(Window(window, state), torch.ones(4), fastest(users, users.param_groups[0]))
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


def test_step_hooks_are_called_once_in_a_step_however_many_tiles():
    model, called = network(), []
    users = torch.optim.AdamW(model.parameters(), lr=0.1)
    users.register_step_pre_hook(lambda *_: called.append("users pre"))
    optimizer = tiled(model, users, 64)
    optimizer.register_step_post_hook(lambda *_: called.append("ours post"))
    everywhere = register_optimizer_step_post_hook(lambda *_: called.append("global post"))
    try:
        backward(model, 0)
        optimizer.step()
    finally:
        everywhere.remove()
    assert len(optimizer.shards[0].states.spans) > 5
    assert sorted(called) == ["global post", "ours post", "users pre"]


def test_a_part_of_the_states_is_no_state_dict():
    model = network()
    optimizer = tiled(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(RuntimeError, match="are sharded over ranks; trainer"):
        optimizer.state_dict()
    with pytest.raises(RuntimeError, match="ckpt_path"):
        optimizer.load_state_dict({})


def test_fused_is_chosen_where_the_user_left_it_open():
    p = [nn.Parameter(torch.zeros(2))]

    def chosen(optimizer):
        return fastest(optimizer, optimizer.param_groups[0]).get("fused")

    assert chosen(torch.optim.AdamW(p)) is True
    assert not chosen(torch.optim.AdamW(p, foreach=True))
    assert not chosen(torch.optim.AdamW(p, fused=False))
    assert not chosen(torch.optim.RMSprop(p))
    assert "params" not in fastest(torch.optim.SGD(p), {"params": p, "lr": 1})


def test_command_lines_find_the_users_optimizer_by_its_name_and_not_the_tiled_one():
    _, optimizer, _, _ = pair(KINDS["AdamW"])
    assert type(optimizer).__name__ == "AdamW" and isinstance(optimizer, TiledOptimizer)
    parser = ArgumentParser()
    parser.add_subclass_arguments(Optimizer, "optimizer", skip={"params"})
    assert parser.parse_args(["--optimizer", "AdamW"]).optimizer.class_path == "torch.optim.AdamW"
