"""The tiled optimizer in one process against the plain torch optimizer, with tiles that cut through parameters."""

import copy

import pytest
import torch
from helpers.optimizer_alone import KINDS, backward, equal, network, pair, tiled
from torch import nn

from lightning_tex.optim.walk import Walk


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
    smallest = 1 if kind == "AdamW" else 5
    sizes = (64, 128, 192, 1 << 20, None) if way == "fused" else (smallest, 7, 1000, 1 << 20, None)
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
    differing = [
        tile_size for tile_size, result in zip(sizes, results, strict=True) if not torch.equal(result, results[0])
    ]
    assert not differing


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


# --- low precision and what others write


def values(piece):
    with piece.shard.states.window(piece.window, Walk()) as window:
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
            p.grad = gradient
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
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, (loaded[name].double() - 0.5).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_memory_that_somebody_gives_a_parameter_is_taken_back(dtype):
    ours, optimizer, theirs, _ = pair(KINDS["SGD"], dtype=dtype)
    plain = KINDS["SGD"](theirs.parameters())
    for step in range(2):
        for model, each in ((ours, optimizer), (theirs, plain)):
            each.zero_grad()
            backward(model, step)
            if step:
                model[0].weight.data = torch.ones_like(model[0].weight)
            each.step()
    tolerance = 2**-7 if dtype is torch.bfloat16 else 1e-12
    equal(ours, theirs, tolerance)
    assert ours[0].weight.data_ptr() == optimizer.shards[0].buffer.parameters.data_ptr()
    assert not torch.equal(ours[0].weight, torch.ones_like(ours[0].weight))


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
