"""A small model with the tiled optimizer, and its twin with the plain one, in one process."""

import copy

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_tex.optim import OptimizerStateConfig, TiledOptimizer
from lightning_tex.parallel.sharding import parameter_shardings
from lightning_tex.parallel.topology import Axis, Topology

KINDS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "AdamW amsgrad, foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, foreach=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1),
    "Adam maximize": lambda p: torch.optim.Adam(p, lr=1e-2, maximize=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "SGD nesterov": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0, rho=0.8),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
}


COMPACT = ("split", "int8", "stochastic")


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 19), nn.Tanh(), nn.LayerNorm(19), nn.Linear(19, 23, bias=False)).to(dtype)


def tiled(model, optimizer, tile_size=64, **state_config):
    parameters = dict(model.named_parameters())
    at = {parameters[name]: p for name, p in parameter_shardings(model, Topology.single()).items()}
    return TiledOptimizer(optimizer, at, Axis("world"), OptimizerStateConfig(tile_size=tile_size, **state_config))


def pair(kind, tile_size=64, dtype=torch.float64):
    """A model with the tiled optimizer, and its twin with the plain one."""
    ours = network(dtype)
    theirs = copy.deepcopy(ours)
    return ours, tiled(ours, kind(ours.parameters()), tile_size), theirs, kind(theirs.parameters())


def backward(model, seed):
    dtype = next(model.parameters()).dtype
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    model(x).square().sum().backward()


def equal(ours, theirs, tolerance=1e-12):
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


class SignDescent(Optimizer):
    """What a third party might write: elementwise, with state, knowing nothing of tiles (Lion)."""

    def __init__(self, params, lr=0.01, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.sub_((0.9 * momentum + 0.1 * p.grad).sign(), alpha=group["lr"])
                momentum.lerp_(p.grad, 1 - group["beta"])


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **options)


def set_gradients(model, step, factor=1.0):
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        gradient = torch.randn(p.shape, generator=generator) * factor
        p.grad = gradient.to(p.dtype) if p.grad is None else p.grad.copy_(gradient)
