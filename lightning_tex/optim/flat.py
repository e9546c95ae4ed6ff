"""Flat buffers: parameters and gradients of one kind, contiguous, so that collectives run in place on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_tex.collectives import gather_in_place, own_part, reduce_scatter_in_place
from lightning_tex.placement import Placement
from lightning_tex.topology import Axis

# Fused CPU kernels give bit-equal results only on windows that start at a multiple of this many elements.
ALIGNMENT = 64


@dataclass(frozen=True)
class Entry:
    """One parameter's place in a buffer: elements ``start`` to ``stop`` of it."""

    parameter: nn.Parameter
    placement: Placement
    start: int
    stop: int
    gradient: Tensor


class FlatBuffer:
    """Parameters of one (optimizer group, replica axis, dtype) and their gradients, each in one flat tensor.

    The parameters become views of it, and so do their gradients. Each rank of the replica axis owns an equal part,
    its shard (ZeRO-1): gradients are reduce-scattered into it, updated there, and parameters all-gathered from it.

    Args:
        parameters: the parameters with their placements, all of one dtype, device and replica axis.
    """

    def __init__(self, parameters: Sequence[tuple[nn.Parameter, Placement]]) -> None:
        # Those that other ranks repeat come last, so that the elements this rank counts in a norm are one range.
        ordered = sorted(parameters, key=lambda pair: pair[1].repeated)
        first, placement = ordered[0]
        self.replicas: Axis = placement.replicas
        self.divisor = placement.divisor
        length = sum(_aligned(p.numel()) for p, _ in ordered)
        part = _aligned(-(-length // self.replicas.size))
        self.parameters = torch.zeros(part * self.replicas.size, dtype=first.dtype, device=first.device)
        self.gradients = torch.zeros_like(self.parameters)
        self.entries: list[Entry] = []
        start = 0
        self.counted = 0
        for parameter, placement in ordered:
            stop = start + parameter.numel()
            view = self.parameters[start:stop].view_as(parameter)
            view.copy_(parameter.detach())
            parameter.data = view
            gradient = self.gradients[start:stop].view_as(parameter)
            parameter.grad = gradient
            self.entries.append(Entry(parameter, placement, start, stop, gradient))
            self.counted = stop if placement.counted else self.counted
            start += _aligned(parameter.numel())

    @property
    def shard(self) -> Tensor:
        """The own part of the parameters, a view."""
        return own_part(self.parameters, self.replicas)

    @property
    def gradient_shard(self) -> Tensor:
        """The own part of the gradients, a view."""
        return own_part(self.gradients, self.replicas)

    @property
    def shard_start(self) -> int:
        """Where the own part begins in the buffer, in elements."""
        return self.replicas.rank * self.shard.numel()

    def zero_gradients(self) -> None:
        """Set all gradients to zero and make every ``.grad`` a view of the buffer again."""
        self.gradients.zero_()
        for entry in self.entries:
            entry.parameter.grad = entry.gradient

    def collect_gradients(self) -> None:
        """Bring into the buffer the gradients that somebody's ``zero_grad`` let autograd put elsewhere."""
        for entry in self.entries:
            grad = entry.parameter.grad
            if grad is entry.gradient:
                continue
            if grad is None:
                entry.gradient.zero_()
            else:
                entry.gradient.copy_(grad)
            entry.parameter.grad = entry.gradient

    def reduce_gradients(self, whole: bool) -> None:
        """Combine gradients over the replicas: sum / data size, into the own part; into all of it if ``whole``."""
        self.collect_gradients()
        reduce_scatter_in_place(self.gradients, self.replicas)
        if self.divisor > 1:
            self.gradient_shard.div_(self.divisor)
        if whole:
            gather_in_place(self.gradients, self.replicas)

    def gather_parameters(self) -> None:
        """Make every rank's parameters those of their owners."""
        gather_in_place(self.parameters, self.replicas)

    def squared_norm(self) -> Tensor:
        """Sum of squares, in fp64, of the gradients in the own part that no other rank counts: a scalar."""
        mine = self.gradient_shard[: max(0, self.counted - self.shard_start)]
        dtype = torch.promote_types(mine.dtype, torch.float32)
        return torch.linalg.vector_norm(mine, dtype=dtype).double().square()


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT
