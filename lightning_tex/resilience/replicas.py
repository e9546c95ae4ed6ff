"""Whether what ranks hold alike is alike: a digest of every tensor, compared over the ranks that hold copies of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_tex.parallel import collectives
from lightning_tex.parallel.errors import UserRuntimeError
from lightning_tex.parallel.flight_record import TRAINING
from lightning_tex.parallel.hashing import scrambled
from lightning_tex.parallel.topology import Axis, Topology

_CHUNK = 1 << 20  # elements whose products are in memory at once
# Words of at most 32 bits: of the product of a longer one that ends in zeros, as 1.0 does, few bits are left.
_WORDS = {1: torch.int8, 2: torch.int16}
# What kernels that sum in another order each time may make of equal copies, relative to the largest value, or to 1.
_ROUNDING = {2: 1e-2, 4: 1e-3, 8: 1e-3}


@dataclass(frozen=True, eq=False)
class Replica:
    """A tensor of which several ranks hold copies.

    Args:
        name: in the model.
        layer: the class of the module that has it.
        tensor: this rank's copy.
        axes: over which ranks hold copies.
        copied: those of them over which a step copies it from one rank, so that no rounding can make it differ.
        remedy: what to do where it differs over one of the others.
    """

    name: str
    layer: str
    tensor: Tensor
    axes: tuple[Axis, ...]
    copied: tuple[Axis, ...]
    remedy: str


class ReplicasDiffer(UserRuntimeError):
    """Ranks hold different values of what they must hold alike; raised on all ranks."""


@dataclass(frozen=True)
class Difference:
    """A replica that differs, as all ranks know it.

    Args:
        replica: this rank's copy.
        axis: over which it differs.
        held: ranks of one group of the axis, by what they hold.
        largest: the largest difference of two ranks' elements, anywhere.
        scale: the largest element, anywhere.
    """

    replica: Replica
    axis: str
    held: tuple[tuple[int, ...], ...]
    largest: float
    scale: float

    @property
    def may_be_rounding(self) -> bool:
        """Whether kernels that do not repeat their results to the bit, as some of GPUs, explain it."""
        tensor = self.replica.tensor
        repeats = tensor.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
        if repeats or not tensor.is_floating_point() or self._is_copied:
            return False
        return self.largest <= _ROUNDING[tensor.element_size()] * max(self.scale, 1.0)

    @property
    def _is_copied(self) -> bool:
        return any(axis.name == self.axis for axis in self.replica.copied)

    def __str__(self) -> str:
        held = " and another ".join(f"on rank(s) {', '.join(map(str, ranks))}" for ranks in self.held)
        replica = self.replica
        remedy = (
            "It is copied from one rank in every step, so something has written to it on some ranks only since then: a "
            "hook or callback that acts on one rank, or a memory error. Legal: the same write on every rank"
            if self._is_copied
            else replica.remedy
        )
        return (
            f"{replica.name} ({replica.layer}, shape {tuple(replica.tensor.shape)}) is to be alike over {self.axis}, "
            f"but has one value {held}; the largest difference is {self.largest:.2g}, the largest value "
            f"{self.scale:.2g}. {remedy}"
        )


def digests(tensors: Sequence[Tensor]) -> Tensor:
    """64 bits of each tensor that depend on its every bit and the bit's place: int64, on their device, which nothing
    waits for. [n]
    """
    words = [_words(tensor) for tensor in tensors]
    longest = min(_CHUNK, max(map(len, words)))
    # Odd: no change of a single element is lost when products wrap. Not kept: it would take memory from training.
    weights = scrambled(torch.arange(longest, device=words[0].device), key=0) | 1
    return torch.stack([_digest(part, weights) for part in words])


def _words(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat.view(_WORDS.get(flat.element_size(), torch.int32))


def _digest(words: Tensor, weights: Tensor) -> Tensor:
    first, *more = words.split(_CHUNK)
    total = (first * weights[: len(first)]).sum()
    for part in more:
        total = total * 3 + (part * weights[: len(part)]).sum()
    return total


def differing(replicas: Sequence[Replica], topology: Topology) -> list[int]:
    """Places of the replicas that are not alike, the same list on all ranks; collective.

    A small all-reduce for every axis of what not all ranks hold, one over the world, and one wait for the device.
    """
    if not replicas:
        return []
    own, world = digests([replica.tensor for replica in replicas]), topology.world
    on_all = [place for place, replica in enumerate(replicas) if prod(a.size for a in replica.axes) == world.size]
    on_some = [place for place in range(len(replicas)) if place not in on_all]
    differ = torch.zeros_like(own)
    for axis in {axis.name: axis for place in on_some for axis in replicas[place].axes}.values():
        places = [place for place in on_some if axis in replicas[place].axes]
        (extremes,) = _largest_of_ranks([_extremes(own[places])], axis)
        differ[places] |= _apart(extremes)
    differ, extremes = _largest_of_ranks([differ, _extremes(own[on_all])], world)
    differ[on_all] = _apart(extremes)
    return [place for place, found in enumerate(differ.tolist()) if found]


def _extremes(values: Tensor) -> Tensor:
    """What shows, as the largest over ranks, the largest value and the complement of the smallest."""
    return torch.cat([values, ~values])


def _apart(extremes: Tensor) -> Tensor:
    """1 where the largest value is not the smallest."""
    largest, smallest = extremes.chunk(2)
    return (largest != ~smallest).long()


def _largest_of_ranks(tensors: list[Tensor], axis: Axis) -> tuple[Tensor, ...]:
    """The largest element of each place of some vectors, in one message."""
    packed = torch.cat(tensors)
    with TRAINING.inside("all_reduce", axis, packed):
        dist.all_reduce(packed, dist.ReduceOp.MAX, group=axis.group)
    return packed.split([len(tensor) for tensor in tensors])


def describe_difference(replica: Replica, topology: Topology) -> Difference | None:
    """What of a replica differs, over the first of its axes over which it does; collective, alike on all ranks.

    ``None``: only bits do that mean the same, such as those of two kinds of NaN.
    """
    by_rank = collectives.all_gather(digests([replica.tensor]), 0, topology.world).tolist()
    for axis in replica.axes:
        for ranks in topology.layout.groups(axis.name):
            by_value: dict[int, list[int]] = {}
            for rank in ranks:
                by_value.setdefault(by_rank[rank], []).append(rank)
            if len(by_value) > 1:
                largest, scale = _largest(replica.tensor, axis, topology)
                if largest != 0:
                    return Difference(replica, axis.name, tuple(map(tuple, by_value.values())), largest, scale)
                break
    return None


def _largest(tensor: Tensor, axis: Axis, topology: Topology) -> tuple[float, float]:
    """The largest difference from the first rank of the axis, and the largest value; of all ranks."""
    own = tensor.detach().double().reshape(-1)
    first = collectives.broadcast(own, axis)
    alike = (own == first) | (own.isnan() & first.isnan())
    figures = torch.stack([(own - first).abs().masked_fill(alike, 0).max(), own.abs().max()])
    largest, scale = collectives.all_reduce(figures, topology.world, "max").tolist()
    return largest, scale
