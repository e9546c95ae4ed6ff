"""One process that decides which choices overflow a capacity as several data ranks would."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_tex.moe import MoE
from lightning_tex.moe.capacity import CapacityDispatcher, Queues
from lightning_tex.moe.expert_axes import ExpertAxes
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.topology import Topology

# T tokens, E experts, k choices per token


@dataclass(frozen=True)
class SlicedCapacity(CapacityDispatcher):
    """The dispatcher of one process that decides overflow as ``slices`` data ranks would, each for its own tokens.

    Args:
        slices: data ranks, which hold consecutive equal shares of the tokens: the first dim is that of the samples.
    """

    slices: int = 1

    def allowed(self, tokens: int, top_k: int) -> int:
        """See the base class.

        Raises:
            UserValueError: the tokens are no equal shares.
        """
        if tokens % self.slices:
            raise UserValueError(
                f"{tokens} tokens of an MoE layer with capacity_factor={self.capacity.factor} are no equal shares of "
                f"{self.slices} data ranks, each of which decides overflow for its own tokens; legal: a multiple of "
                f"{self.slices} tokens in every call, samples first, or capacity_factor=None for the comparison"
            )
        return super().allowed(tokens // self.slices, top_k)

    def queues(self, indices: Tensor, allowed: int, priority: Tensor | None) -> Queues:
        share = len(indices) // self.slices or 1
        own = indices.split(share)
        first = [None] * len(own) if priority is None else priority.split(share)
        parts = [
            super(SlicedCapacity, self).queues(*part) for part in zip(own, [allowed] * len(own), first, strict=True)
        ]
        place, counts, overflowed = zip(*parts, strict=True)
        return Queues(torch.cat(place), torch.stack(counts).sum(0), torch.stack(overflowed).sum())


def has_capacity(root: nn.Module) -> bool:
    """Whether choices may overflow somewhere: then a batch's slices matter."""
    return any(isinstance(module, MoE) and module.capacity_factor is not None for module in root.modules())


def decide_overflow_as(root: nn.Module, slices: int) -> None:
    """Let the MoE layers of a model in one process decide overflow as ``slices`` data ranks would."""
    axes = ExpertAxes.of(Topology.single())
    for module in root.modules():
        if isinstance(module, MoE) and module.capacity is not None:
            module.dispatcher = SlicedCapacity(module.num_experts, axes, module.capacity, slices)
