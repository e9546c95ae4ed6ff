"""One process that decides which choices overflow a capacity as several data ranks would."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_tex.moe import MoE
from lightning_tex.moe.capacity import CapacityDispatcher, assign_slots, capacity
from lightning_tex.moe.dispatch import Arrived, DispatchMetadata
from lightning_tex.moe.exchange import CapacityExchange, to_experts
from lightning_tex.moe.expert_axes import ExpertAxes
from lightning_tex.moe.router import Route
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.topology import Topology

# T tokens, E experts, C capacity, k choices per token


@dataclass(frozen=True)
class SlicedCapacity(CapacityDispatcher):
    """The dispatcher of one process that decides overflow as ``slices`` data ranks would, each for its own tokens.

    Args:
        slices: data ranks, which hold consecutive equal shares of the tokens: the first dim is that of the samples.
    """

    slices: int = 1

    def dispatch(self, x: Tensor, route: Route) -> tuple[Arrived, DispatchMetadata]:
        """See the base class.

        Raises:
            UserValueError: the tokens are no equal shares.
        """
        tokens, top_k = route.indices.shape
        if tokens % self.slices:
            raise UserValueError(
                f"{tokens} tokens of an MoE layer with capacity_factor={self.factor} are no equal shares of "
                f"{self.slices} data ranks, each of which decides overflow for its own tokens; legal: a multiple of "
                f"{self.slices} tokens in every call, samples first, or capacity_factor=None for the comparison"
            )
        share, experts = tokens // self.slices, self.num_experts
        rows = capacity(self.factor, top_k, share, experts)
        slots = [assign_slots(indices, experts, rows, rows) for indices in route.indices.split(share)]
        slot, choice = [], []
        for i, part in enumerate(slots):  # an expert's rows of one slice come after those of the slice before
            row = part.slot // rows * rows * self.slices + i * rows + part.slot % rows
            slot.append(torch.where(part.slot < experts * rows, row, experts * rows * self.slices))
            moved = torch.where(part.choice < share * top_k, part.choice + i * share * top_k, tokens * top_k)
            choice.append(moved.view(experts, rows))
        exchange = CapacityExchange(self.axes, torch.cat(slot), torch.cat(choice, 1))
        overflowed = torch.stack([part.overflowed for part in slots]).sum()
        arrived = Arrived(to_experts(x.reshape(tokens, -1), exchange), [rows * self.slices] * experts)
        return arrived, DispatchMetadata(exchange, route.weights, x.dtype, overflowed)


def has_capacity(root: nn.Module) -> bool:
    """Whether choices may overflow somewhere: then a batch's slices matter."""
    return any(isinstance(module, MoE) and module.capacity_factor is not None for module in root.modules())


def decide_overflow_as(root: nn.Module, slices: int) -> None:
    """Let the MoE layers of a model in one process decide overflow as ``slices`` data ranks would."""
    axes = ExpertAxes.of(Topology.single())
    for module in root.modules():
        if isinstance(module, MoE) and module.capacity_factor is not None:
            module.dispatcher = SlicedCapacity(module.num_experts, axes, module.capacity_factor, slices)
