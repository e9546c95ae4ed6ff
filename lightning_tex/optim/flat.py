"""Flat buffers: parameters of one kind, contiguous, so that collectives run in place on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_tex.optim.flat_sizes import aligned, bucketed, part_length
from lightning_tex.parallel.extent import Extent
from lightning_tex.parallel.in_place_collectives import Started, gather_in_place, own_part
from lightning_tex.parallel.sharding import ParameterSharding
from lightning_tex.parallel.topology import Axis

Member = tuple[nn.Parameter, ParameterSharding]


@dataclass(frozen=True, eq=False)
class Entry:
    """One parameter's elements in a flat buffer."""

    parameter: nn.Parameter
    sharding: ParameterSharding
    extent: Extent

    @property
    def start(self) -> int:
        """Where it begins in the buffer."""
        return self.extent.offsets[0]

    @property
    def stop(self) -> int:
        """Where it ends in the buffer."""
        return self.extent.stops[0]


class FlatBuffer:
    """Parameters of one (optimizer group, kind, dtype) in one flat tensor, of which they become views.

    Each rank of ``owners`` owns an equal part, updates it, and gathers the others' parts.

    Args:
        parameters: the parameters with their shardings, all of one :func:`kind`.
        sharded: owned in parts by the ranks that hold replicas (ZeRO 1 and 2); else whole by each of them (ZeRO 0).
    """

    def __init__(self, parameters: Sequence[Member], sharded: bool = True) -> None:
        first, sharding = parameters[0]
        self.replicas: Axis = sharding.replicas
        self.owners = self.replicas if sharded else Axis(self.replicas.name)
        self.partial_axis: Axis = sharding.partial_axis
        self.divisor = sharding.divisor
        self.counted = sharding.counted and (sharded or self.replicas.rank == 0)
        part = part_length([p.numel() for p, _ in parameters], self.owners.size)
        self.parameters = torch.zeros(part * self.owners.size, dtype=first.dtype, device=first.device)
        self.entries: list[Entry] = []
        start = 0
        for parameter, sharding in parameters:
            entry = Entry(parameter, sharding, Extent.run(start, start + parameter.numel()))
            view = self.view(self.parameters, entry)
            view.copy_(parameter.detach())
            parameter.data = view
            self.entries.append(entry)
            start += aligned(parameter.numel())

    @property
    def are_alone(self) -> bool:
        """Whether gradients of the parameters are never reduced."""
        return self.replicas.size == self.partial_axis.size == self.divisor == 1

    @staticmethod
    def view(flat: Tensor, entry: Entry) -> Tensor:
        """The place of a parameter in a tensor laid out as the buffer, in the parameter's shape."""
        return flat[entry.extent.slices].view_as(entry.parameter)

    def take_back(self) -> bool:
        """Make views again of parameters that somebody has given other memory (``p.data = ..``), with their values.

        Returns:
            whether there were any.
        """
        first, size = self.parameters.data_ptr(), self.parameters.element_size()
        elsewhere = [
            entry
            for entry in self.entries
            if entry.parameter.data_ptr() != first + entry.start * size and entry.parameter.numel()
        ]
        for entry in elsewhere:
            view = self.view(self.parameters, entry)
            view.copy_(entry.parameter.detach())
            entry.parameter.data = view
        return bool(elsewhere)

    @property
    def own(self) -> Tensor:
        """The own part of the parameters, a view."""
        return own_part(self.parameters, self.owners)

    @property
    def own_start(self) -> int:
        """Where the own part begins in the buffer, in elements."""
        return self.owners.rank * len(self.own)

    def gather(self) -> Started:
        """Make every rank's parameters those of their owners; done after ``wait()``."""
        return gather_in_place(self.parameters, self.owners)


def kind(parameter: nn.Parameter, sharding: ParameterSharding) -> tuple[object, ...]:
    """What parameters of one buffer have in common."""
    return sharding.replicas.name, sharding.repeated, sharding.declared_partial, parameter.dtype, parameter.device


def buckets(members: list[Member]) -> Iterator[list[Member]]:
    """Consecutive parameters, as many as make up a buffer; all in one where there is nothing to communicate."""
    for span in bucketed([parameter.numel() for parameter, _ in members], members[0][1].replicas.size):
        yield members[span]
