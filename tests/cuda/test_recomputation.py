"""Recomputed blocks on a GPU draw the same random numbers again, however they are called."""

from __future__ import annotations

import pytest
import torch
from helpers.on_a_gpu import DEVICE, close
from torch import Tensor, nn

from lightning_tex.layers import ParallelAttention, ParallelMLP
from lightning_tex.moe import MoE
from lightning_tex.parallel.activation_checkpointing import recompute_blocks


class Block(nn.Module):
    def __init__(self, capacity_factor: float | None) -> None:
        super().__init__()
        self.attention = ParallelAttention(32, 4, dropout=0.2)
        self.moe = MoE(32, 48, 4, 2, capacity_factor, load_balance_coefficient=0.0)
        self.mlp = ParallelMLP(32, 48, "swiglu")
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor, scale: float) -> Tensor:
        x = x + self.drop(self.moe(x)) * scale
        x = x + self.attention(x)
        return x + self.drop(self.mlp(x))


class Stack(nn.Module):
    def __init__(self, capacity_factor: float | None, named: bool) -> None:
        super().__init__()
        self.named = named
        self.blocks = nn.ModuleList(Block(capacity_factor) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x=x, scale=0.5) if self.named else block(x, 0.5)
        return x


def gradients(stack: Stack, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    stack.zero_grad()
    torch.manual_seed(7)
    torch.rand(3, device=DEVICE)  # the GPU's generator stands where no seed puts it
    stack(x).square().mean().backward()
    return {"input": x.grad, **{name: p.grad.clone() for name, p in stack.named_parameters()}}


@pytest.mark.parametrize("named", [False, True], ids=["by place", "by keyword"])
@pytest.mark.parametrize("mode", ["full", "communication_aware"])
@pytest.mark.parametrize("capacity_factor", [None, 1.25], ids=["dropless", "capacity"])
def test_gradients_are_those_without_recomputation(mode: str, named: bool, capacity_factor: float | None) -> None:
    torch.manual_seed(0)
    stack = Stack(capacity_factor, named).to(DEVICE)
    x = torch.randn(2, 12, 32, device=DEVICE)
    expected = gradients(stack, x)
    recompute_blocks(stack, mode)
    for name, gradient in gradients(stack, x).items():
        close(gradient, expected[name], 1e-5, f"gradient of {name} with {mode} (another dropout mask differs by > 0.1)")
