"""Muon of stacks, several optimizers as one, and the two of a model: plain torch optimizers in one process."""

import copy

import pytest
import torch
from torch import nn

from lightning_tex.layers import VocabParallelEmbedding, VocabParallelHead
from lightning_tex.moe import MoE
from lightning_tex.optim import CombinedOptimizer, Muon, MuonAdamW, hidden_matrices, optimized_parameters


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = VocabParallelEmbedding(13, 8)
        self.norm = nn.LayerNorm(8)
        self.moe = MoE(8, 12, 4, bias=True)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = VocabParallelHead(8, 13)
        self.lr_scale = None


def set_gradients(parameters, step):
    generator = torch.Generator().manual_seed(step)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)


def test_each_matrix_of_a_stack_is_stepped_as_torch_steps_it_alone():
    stack = nn.Parameter(torch.randn(2, 3, 8, 5, generator=torch.Generator().manual_seed(1)))
    alone = [nn.Parameter(matrix.detach().clone()) for matrix in stack.reshape(-1, 8, 5)]
    options = {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.8, "adjust_lr_fn": "match_rms_adamw"}
    ours, torchs = Muon([stack], **options), torch.optim.Muon(alone, **options)
    for step in range(3):
        set_gradients([stack], step)
        for matrix, gradient in zip(alone, stack.grad.reshape(-1, 8, 5), strict=True):
            matrix.grad = gradient.clone()
        ours.step()
        torchs.step()
    assert torch.equal(stack.detach().reshape(-1, 8, 5), torch.stack([matrix.detach() for matrix in alone]))
    assert ours.state[stack]["momentum_buffer"].shape == stack.shape
    with pytest.raises(ValueError, match=r"a parameter has shape \(3,\); legal: other parameters in AdamW"):
        Muon([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="momentum should be >= 0"):
        Muon([stack], momentum=-1.0)


def test_hidden_matrices_lie_between_embedding_and_head():
    model = Model()
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, rest = ([names[id(p)] for p in some] for some in hidden_matrices(model))
    assert sorted(matrices) == ["moe.experts.down", "moe.experts.up", "moe.router.weight"]
    assert {"embedding.weight", "head.weight", "norm.weight", "moe.experts.up_bias"} <= set(rest)
    assert not any("frozen" in name for name in (*matrices, *rest))


def test_a_combined_optimizer_is_its_optimizers():
    model, twin = Model(), Model()
    combined = MuonAdamW(model, lr=1e-2, muon_lr=3e-2)
    matrices, rest = hidden_matrices(twin)
    vectors = [p for p in rest if p.dim() <= 1]
    ends = [p for p in rest if p.dim() > 1]
    muon = Muon(matrices, 3e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": ends}, {"params": vectors, "weight_decay": 0.0}], 1e-2, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(combined, lambda step: 0.5**step)
    for step in range(4):
        for one in (model, twin):
            set_gradients([p for p in one.parameters() if p.requires_grad], step)
        combined.step()
        muon.step()
        adamw.step()
        schedule.step()
        for group in (*muon.param_groups, *adamw.param_groups):
            group["lr"] *= 0.5
        if step == 1:  # goes on from its states, in another object
            state, model = copy.deepcopy(combined.state_dict()), copy.deepcopy(model)
            combined = MuonAdamW(model, lr=1.0)
            combined.load_state_dict(state)
            schedule = torch.optim.lr_scheduler.LambdaLR(combined, lambda step: 0.5**step, last_epoch=1)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert [len(one.param_groups) for one in combined.optimizers] == [1, 2]
    combined.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert combined.stepper_of(combined.param_groups[-1]) is combined.optimizers[1]


def test_what_does_not_go_is_refused():
    model = Model()
    with pytest.raises(ValueError, match="cannot tell hidden matrices from embeddings by their shapes"):
        MuonAdamW(model.parameters())
    with pytest.raises(ValueError, match="the model has no hidden matrices to train"):
        MuonAdamW(nn.Embedding(3, 4))
    with pytest.raises(ValueError, match="one optimizer or more"):
        CombinedOptimizer([])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        CombinedOptimizer([torch.optim.SGD(model.parameters()), torch.optim.Adam(model.norm.parameters())])


def test_recipes_give_it_its_groups():
    model = Model()
    named = {"class_path": "lightning_tex.optim.MuonAdamW", "init_args": {"lr": 1e-2, "muon_lr": 3e-2}}
    assert len(MuonAdamW(optimized_parameters(model, named), **named["init_args"]).param_groups) == 3
    model.lr_scale = {"moe.experts": 0.5, "norm": 0.1}
    optimizer = MuonAdamW(optimized_parameters(model, named), **named["init_args"])
    rates = sorted(group["lr"] for group in optimizer.param_groups)
    assert rates == pytest.approx([1e-3, 5e-3, 1e-2, 1.5e-2, 3e-2])
    of_torch = {"class_path": "torch.optim.SGD"}
    assert len(list(optimized_parameters(nn.Linear(2, 2), of_torch))) == 2
