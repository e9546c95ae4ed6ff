"""A sharded model with the tiled optimizer on every rank, beside the whole one with the plain optimizer."""

import copy

import torch
from torch import nn

from helpers.topologies import join
from lightning_tex.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from lightning_tex.moe import MoE
from lightning_tex.optim import OptimizerStateConfig, TiledOptimizer
from lightning_tex.parallel.collectives import all_reduce
from lightning_tex.parallel.hashing import stable_hash
from lightning_tex.parallel.sharding import parameter_shardings, shard_module

# tensor, expert, expert_tensor
LAYOUTS = [(2, 2, 2), (2, 2, 1), (2, 1, 2), (1, 2, 1), (4, 4, 1), (1, 1, 1)]


class Model(nn.Module):
    """Sharded, padded, expert and plain parameters."""

    def __init__(self):
        super().__init__()
        self.embedding = VocabParallelEmbedding(13, 8)
        self.norm = nn.LayerNorm(8)
        self.column = ColumnParallelLinear(8, 20)
        self.row = RowParallelLinear(20, 8)
        self.moe = MoE(8, 12, 4, activation="swiglu")


def made(name, replica, step, shape):
    seed = stable_hash(name, replica, step) % 2**31
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Pair:
    """A sharded model with the tiled optimizer beside the whole one with the plain optimizer."""

    def __init__(self, layout, kind, dtype=torch.float64, **state_config):
        self.topology = join(*layout)
        torch.manual_seed(0)
        self.whole = Model().to(dtype)
        self.parted = copy.deepcopy(self.whole)
        shard_module(self.parted, self.topology)
        self.shardings = parameter_shardings(self.parted, self.topology)
        parameters = dict(self.parted.named_parameters())
        at = {parameters[name]: p for name, p in self.shardings.items()}
        config = OptimizerStateConfig(**{"tile_size": 64, **state_config})
        self.optimizer = TiledOptimizer(kind(self.parted), at, self.topology.world, config)
        self.plain = kind(self.whole)

    def set_gradients(self, step):
        self.optimizer.zero_grad()
        for name, p in self.parted.named_parameters():
            at = self.shardings[name]
            p.grad = at.box.shard(made(name, at.replicas.rank, step, at.box.full)).to(p.dtype)
        for name, p in self.whole.named_parameters():
            at = self.shardings[name]
            total = sum(made(name, replica, step, at.box.full) for replica in range(at.replicas.size))
            p.grad = (total / self.topology.data.size).to(p.dtype)

    def take_steps(self, max_norm=None):
        """Three of both, clipped where a norm is given, with learning rates that fall."""
        for step in range(3):
            self.set_gradients(step)
            if max_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.whole.parameters(), max_norm)
                self.optimizer.clip_by_norm(max_norm)
            self.optimizer.step()
            self.plain.step()
            for each in (self.optimizer, self.plain):
                each.param_groups[0]["lr"] *= 0.7

    def load(self, step):
        """Write made values into the sharded model, as a checkpoint does; its new parameters by name."""
        written = {}
        for name, p in self.parted.named_parameters():
            at = self.shardings[name]
            written[name] = at.box.shard(made(name, 0, step, at.box.full)).to(p.dtype)
        self.parted.load_state_dict({**self.parted.state_dict(), **written})
        return written

    def compare(self, tolerance=1e-12):
        for (name, p), q in zip(self.parted.named_parameters(), self.whole.named_parameters(), strict=True):
            assert q[0] == name
            gathered = self.shardings[name].gather(p.detach())
            torch.testing.assert_close(gathered, q[1].detach(), rtol=tolerance, atol=tolerance)
            box = self.shardings[name].box
            assert torch.equal(box.shard(gathered), p.detach()), f"padding of {name} is not zero"
        self.assert_replicas_equal()

    def assert_replicas_equal(self):
        by_axis = {}
        for name, p in self.parted.named_parameters():
            by_axis.setdefault(self.shardings[name].replicas, {})[name] = p.detach().flatten()
        for axis, parameters in by_axis.items():  # one collective for all of an axis
            largest = all_reduce(torch.cat([*parameters.values()]), axis, "max").split(
                [len(p) for p in parameters.values()]
            )
            for (name, p), most in zip(parameters.items(), largest, strict=True):
                assert torch.equal(most, p), f"{name} differs between replicas"


class Named:
    """Parameters as a module would have them."""

    def __init__(self, parameters):
        self.named_parameters, self.parameters = parameters.items, parameters.values


class SixteenBits(Pair):
    """Both in bf16, the plain optimizer over masters in fp32."""

    def __init__(self, layout, kind, **state_config):
        super().__init__(layout, kind, torch.bfloat16, **state_config)
        self.masters = {name: nn.Parameter(p.detach().float()) for name, p in self.whole.named_parameters()}
        self.plain = kind(Named(self.masters))

    def set_gradients(self, step):
        self.optimizer.zero_grad()
        for name, p in self.parted.named_parameters():
            at = self.shardings[name]
            gradient = made(name, 0, step, at.box.full).bfloat16()
            # Alike on all replicas and divided by a power of two: no rounding on the way.
            p.grad = at.box.shard(gradient)
            self.masters[name].grad = (gradient * (at.replicas.size / at.divisor)).float()

    def compare(self, tolerance=2**-7):
        for name, p in self.parted.named_parameters():
            expected = self.masters[name].detach().bfloat16()
            torch.testing.assert_close(self.shardings[name].gather(p.detach()), expected, rtol=tolerance, atol=1e-6)


def by_group(model):
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": decayed, "weight_decay": 0.2, "lr": 3e-3}, {"params": rest}]


KINDS = [
    lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
    lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    lambda m: torch.optim.Adam(by_group(m), lr=1e-2),
]
