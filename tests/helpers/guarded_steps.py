"""Steps of the tiled optimizer, alone, in every format and by many kinds of optimizer, guarded and clipped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helpers.optimizer_alone import SignDescent, network, set_gradients, tiled
from lightning_tex.optim import TiledOptimizer

KINDS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
    "Lion": SignDescent,
}
# dtype of parameters, format
FORMATS = {
    "fp64": (torch.float64, "fp32"),
    "fp32": (torch.float32, "fp32"),
    "masters": (torch.bfloat16, "fp32"),
    "split": (torch.bfloat16, "split"),
    "int8": (torch.bfloat16, "int8"),
    "stochastic": (torch.bfloat16, "stochastic"),
}
# Kinds in one format, and one kind in all others.
CASES = [*((kind, "fp32") for kind in KINDS), *(("AdamW", form) for form in FORMATS if form != "fp32")]


def made(kind: str, form: str, device: torch.device, **options: Any) -> tuple[torch.nn.Module, TiledOptimizer]:
    dtype, state_format = FORMATS[form]
    model = network(dtype).to(device)
    options = {"optimizer_state_format": state_format, "max_skipped_steps": 3, **options}
    return model, tiled(model, KINDS[kind](model.parameters()), **options)


def step(model: torch.nn.Module, optimizer: TiledOptimizer, number: int, factor: float = 1.0) -> None:
    optimizer.zero_grad()
    for p, q in zip(model.parameters(), gradients(number, factor), strict=True):
        p.grad = q.to(p)
    optimizer.clip_by_norm(1.0)
    optimizer.step()


def gradients(number: int, factor: float) -> list[Tensor]:
    """The same on every device."""
    model = network(torch.float32)
    set_gradients(model, number, factor)
    return [p.grad for p in model.parameters()]


def values(optimizer: TiledOptimizer) -> list[Tensor]:
    """Values of the most precision that are kept, and the parameters."""
    exact = [t for shard in optimizer.shards for kind, t in shard.states.memory() if kind == "master"]
    if exact and exact[0].dtype == torch.int16:  # what is beside the parameter's bits
        exact = []
    return [*exact, *(shard.buffer.parameters for shard in optimizer.shards)]


def everything(optimizer: TiledOptimizer) -> list[Tensor]:
    states = [t for shard in optimizer.shards for _, t in shard.states.memory()]
    return [t.clone() for t in (*states, *(shard.buffer.parameters for shard in optimizer.shards))]


def whole_step(model: torch.nn.Module, optimizer: TiledOptimizer, x: Tensor, clip: str) -> None:
    optimizer.zero_grad()
    loss = model(x).square().sum()
    optimizer.backward_begins(loss, last=True, undisturbed=True)
    loss.backward()
    optimizer.backward_ended()
    if clip == "norm":
        optimizer.clip_by_norm(1.0)
    else:
        optimizer.clip_by_value(0.1)
    optimizer.step()
