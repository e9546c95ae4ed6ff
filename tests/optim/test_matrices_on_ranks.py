"""Optimizers that need whole matrices, on every layout, against the same ones in one process."""

import pytest
import torch
from helpers.cases import case
from helpers.optimizer_alone import COMPACT, tiled
from helpers.optimizer_on_ranks import LAYOUTS, Pair, SixteenBits
from torch import nn
from torch.optim import Optimizer

from lightning_tex.optim import CombinedOptimizer, Muon
from lightning_tex.testing.ranks import run_ranks


class Polar(Optimizer):
    """What a third party might write: steps along the orthogonal factor of each matrix, with momentum."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(0.9).add_(p.grad)
                u, _, v = torch.linalg.svd(momentum, full_matrices=False)
                p.add_(u @ v, alpha=-group["lr"])


def split(model, kind):
    """Matrices by one optimizer, vectors by AdamW."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    return CombinedOptimizer([kind(matrices), torch.optim.AdamW(rest, lr=1e-2)])


def adafactor(model):
    """Its clipping is by a whole tensor, so that experts are another matter."""
    experts = [p for n, p in model.named_parameters() if "experts" in n]
    rest = [p for n, p in model.named_parameters() if "experts" not in n]
    return CombinedOptimizer([torch.optim.SGD(experts, lr=0.1), torch.optim.Adafactor(rest, lr=0.1)])


KINDS = {
    "Muon": lambda model: split(model, lambda p: Muon(p, lr=0.02)),
    "Muon as AdamW": lambda model: split(model, lambda p: Muon(p, lr=0.02, adjust_lr_fn="match_rms_adamw")),
    "Polar": lambda model: split(model, Polar),
    "Adafactor": adafactor,
}


def steps(layouts, stages):
    for layout in layouts:
        for kind in KINDS:
            for stage in stages:
                with case(layout, kind=kind, stage=stage):
                    pair = Pair(layout, KINDS[kind], zero_stage=stage)
                    pair.take_steps(max_norm=1.0)
                    pair.compare(1e-10)


def test_steps_of_whole_matrices_are_those_of_one_process():
    run_ranks(4, steps, LAYOUTS[:2], (1,))


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_steps_of_whole_matrices_on_every_layout(stage):
    run_ranks(4, steps, LAYOUTS, (stage,))
    run_ranks(2, steps, [(2, 1, 2), (2, 2, 1), (1, 2, 1), (1, 1, 1)], (stage,))
    run_ranks(1, steps, [(1, 1, 1)], (stage,))


def masters():
    for layout, stage in zip(LAYOUTS[:2], (1, 2), strict=True):
        with case(layout, stage=stage):
            pair = SixteenBits(layout, KINDS["Polar"], zero_stage=stage)
            for step in range(2):
                pair.set_gradients(step)
                pair.optimizer.step()
                pair.plain.step()
            pair.compare()
            pair.load(7)
            for shard in pair.optimizer.shards:
                shard.refresh()
                for master in shard.states.memory():
                    assert master[0] != "master" or torch.equal(master[1], master[1].bfloat16().float())


def test_bf16_matrices_follow_their_fp32_masters_and_these_what_is_loaded():
    run_ranks(4, masters)


def test_a_step_with_an_infinity_changes_nothing():
    model = nn.Linear(6, 6, bias=False)
    optimizer = tiled(model, torch.optim.Muon(model.parameters(), lr=0.1), max_skipped_steps=2)
    before = model.weight.detach().clone()
    model.weight.grad = torch.full((6, 6), torch.inf)
    optimizer.step()
    assert torch.equal(model.weight, before) and optimizer.skipped.total == 1
    optimizer.zero_grad()
    model.weight.grad = torch.ones(6, 6)
    optimizer.step()
    assert not torch.equal(model.weight, before) and optimizer.skipped.in_a_row == 0


@pytest.mark.parametrize("form", COMPACT)
def test_compact_formats_are_refused_by_name(form):
    model = nn.Linear(6, 6, bias=False, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=f"optimizer Muon needs whole matrices, and optimizer_state_format='{form}'"):
        tiled(model, torch.optim.Muon(model.parameters()), optimizer_state_format=form)
