"""Flat buffers: parameters and gradients of one kind, contiguous, so that collectives run in place on them."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_tex.collectives import Started, gather_in_place, own_part, reduce_scatter_in_place, sum_in_place
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
    """Parameters of one (optimizer group, kind, dtype) and their gradients, each in one flat tensor.

    The parameters become views of it, and so do their gradients. Each rank of the replica axis owns an equal part,
    its shard (ZeRO-1): gradients are reduce-scattered into it, updated there, and parameters all-gathered from it.

    Args:
        parameters: the parameters with their placements, all of one :func:`kind`.
    """

    def __init__(self, parameters: Sequence[tuple[nn.Parameter, Placement]]) -> None:
        first, placement = parameters[0]
        self.replicas: Axis = placement.replicas
        self.parts: Axis = placement.parts
        self.divisor = placement.divisor
        self.counted = placement.counted
        length = sum(_aligned(p.numel()) for p, _ in parameters)
        part = _aligned(-(-length // self.replicas.size))
        self.parameters = torch.zeros(part * self.replicas.size, dtype=first.dtype, device=first.device)
        self.gradients = torch.zeros_like(self.parameters)
        self.entries: list[Entry] = []
        self._reduction: Started | None = None
        start = 0
        for parameter, placement in parameters:
            stop = start + parameter.numel()
            view = self.parameters[start:stop].view_as(parameter)
            view.copy_(parameter.detach())
            parameter.data = view
            gradient = self.gradients[start:stop].view_as(parameter)
            parameter.grad = gradient
            self.entries.append(Entry(parameter, placement, start, stop, gradient))
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
        if self._reduction is not None:  # of a step that was given up
            self._reduction.wait()
            self._reduction = None
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

    @property
    def reducing(self) -> bool:
        """Whether the gradients are on their way to their owners."""
        return self._reduction is not None

    def start_reduction(self) -> None:
        """Send the gradients, which are complete, to their owners. Collective; :meth:`finish_reduction` waits."""
        self.collect_gradients()
        self._reduction = reduce_scatter_in_place(self.gradients, self.replicas)

    def finish_reduction(self, whole: bool, direct: Set[Tensor] = frozenset()) -> None:
        """Combine the gradients over the replicas: sum / data size, into the own part; into all of it if ``whole``.

        Args:
            whole: gather what the owners have.
            direct: parameters whose gradients are whole on every rank of ``parts``; the others' are summed over it.
        """
        assert self._reduction is not None
        self._reduction.wait()
        self._reduction = None
        if self.parts.size > 1:
            kept = [(place, place.clone()) for entry in self.entries if entry.parameter in direct
                    for place in [self.gradient_shard[self._within_shard(entry)]]]  # fmt: skip
            sum_in_place(self.gradient_shard, self.parts).wait()
            for place, gradient in kept:
                place.copy_(gradient)
        if self.divisor > 1:
            self.gradient_shard.div_(self.divisor)
        if whole:
            gather_in_place(self.gradients, self.replicas).wait()

    def _within_shard(self, entry: Entry) -> slice:
        length = self.shard.numel()
        return slice(*(min(max(at - self.shard_start, 0), length) for at in (entry.start, entry.stop)))

    def gather_parameters(self) -> Started:
        """Make every rank's parameters those of their owners; done after ``wait()``."""
        return gather_in_place(self.parameters, self.replicas)

    def squared_norm(self) -> Tensor:
        """Sum of squares, in fp64, of the gradients in the own part; 0 where another rank counts them: a scalar."""
        mine = self.gradient_shard[: len(self.gradient_shard) if self.counted else 0]
        dtype = torch.promote_types(mine.dtype, torch.float32)
        return torch.linalg.vector_norm(mine, dtype=dtype).double().square()


def kind(parameter: nn.Parameter, placement: Placement) -> tuple[object, ...]:
    """What parameters of one buffer have in common."""
    return placement.replicas.name, placement.repeated, parameter.dtype, parameter.device


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT
