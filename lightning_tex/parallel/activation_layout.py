"""How the tensor axis holds the activations between layers: replicated, or sharded along the sequence.

Layers enter and leave their tensor-parallel regions through an activation layout and never ask which one it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_tex.parallel.collectives import (
    BORDERS,
    broadcast,
    enter,
    enter_split,
    gather,
    own_slice,
    reduce,
    reduce_,
    reduce_split,
    split,
)
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.replay import products_then
from lightning_tex.parallel.topology import Axis, Topology

# S positions of a sequence, s positions held here, D model width


@dataclass(frozen=True)
class ActivationLayout(ABC):
    """How the ranks of the tensor axis hold the activations between layers.

    Args:
        tensor: the axis.
    """

    tensor: Axis

    @staticmethod
    def of(topology: Topology) -> ActivationLayout:
        """That of a topology: sequence-sharded under sequence parallelism, else replicated."""
        kind = SequenceSharded if topology.communication.sequence_parallel else Replicated
        return kind(topology.tensor)

    @property
    @abstractmethod
    def shard_axis(self) -> Axis:
        """The axis the activations are sharded over; size 1 where it is not."""

    @abstractmethod
    def enter(self, x: Tensor) -> Tensor:
        """Into a region whose ranks each compute a part: [.., s, D] -> [.., S, D]."""

    @abstractmethod
    def leave(self, partial: Tensor) -> Tensor:
        """Out of such a region: the sum of what its ranks computed, as between layers. [.., S, D] -> [.., s, D]"""

    def leave_products(self, products: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """:meth:`leave` of the sum of ``x @ weight.mT``, the last of such a region.

        Args:
            products: pairs of x [.., S, in] and weight [D, in].
        """
        if self.tensor.size == 1:
            first, *others = (F.linear(x, weight) for x, weight in products)
            return sum(others, first)
        return products_then(products, self.leave_own)

    def leave_own(self, partial: Tensor) -> Tensor:
        """:meth:`leave` of what nobody else has, and what may be overwritten."""
        return self.leave(partial)

    @abstractmethod
    def gather_columns(self, columns: Tensor) -> Tensor:
        """Out of such a region: whole rows of the columns that its ranks hold. [.., S, d] -> [.., s, D]"""

    @abstractmethod
    def agree(self, decision: Tensor) -> Tensor:
        """One decision on what several ranks hold alike. No gradient."""

    @abstractmethod
    def total(self, x: Tensor) -> Tensor:
        """A sum over own tokens -> over the tokens of all tensor ranks."""

    @abstractmethod
    def shard_mask(self, mask: Tensor, x: Tensor) -> Tensor:
        """The part of a mask [.., S] that belongs to the activations ``x`` [.., s, D] held here: [.., s]."""


class Replicated(ActivationLayout):
    """Every tensor rank holds all positions, s = S (Megatron's tensor parallelism, TED)."""

    @property
    def shard_axis(self) -> Axis:
        return Axis(self.tensor.name)

    def enter(self, x: Tensor) -> Tensor:
        """Identity forward, all-reduce backward."""
        return enter(x, self.tensor)

    def leave(self, partial: Tensor) -> Tensor:
        """All-reduce forward, identity backward."""
        return reduce(partial, self.tensor)

    def leave_own(self, partial: Tensor) -> Tensor:
        """All-reduce in place forward, identity backward."""
        return reduce_(partial, self.tensor)

    def gather_columns(self, columns: Tensor) -> Tensor:
        """All-gather forward, split backward."""
        return gather(columns, -1, self.tensor)

    def agree(self, decision: Tensor) -> Tensor:
        """Tensor rank 0's."""
        return broadcast(decision, self.tensor)

    def total(self, x: Tensor) -> Tensor:
        """Identity in both directions."""
        return x

    def shard_mask(self, mask: Tensor, x: Tensor) -> Tensor:
        return mask


class SequenceSharded(ActivationLayout):
    """Tensor ranks hold consecutive equal parts of every sequence, dim -2 (Megatron's sequence parallelism)."""

    @property
    def shard_axis(self) -> Axis:
        return self.tensor

    def enter(self, x: Tensor) -> Tensor:
        """All-gather forward, reduce-scatter backward."""
        return enter_split(x, -2, self.tensor)

    def leave(self, partial: Tensor) -> Tensor:
        """Reduce-scatter forward, all-gather backward.

        Raises:
            ValueError: a length that the tensor axis does not divide.
        """
        length = partial.shape[-2]
        if length % self.tensor.size:
            raise UserValueError(
                f"sequence_parallel=True splits each sequence over tensor_parallel_size={self.tensor.size}, which does "
                f"not divide its length of {length}; legal: multiples of {self.tensor.size} (pad the sequences), or "
                "sequence_parallel=False"
            )
        return reduce_split(partial, -2, self.tensor)

    def gather_columns(self, columns: Tensor) -> Tensor:
        """All-gather and split forward, all-gather and split backward."""
        return split(gather(columns, -1, self.tensor), -2, self.tensor)

    def agree(self, decision: Tensor) -> Tensor:
        """The own: ranks hold different tokens."""
        return decision

    def total(self, x: Tensor) -> Tensor:
        """All-reduce forward, identity backward: gradients are partial sums, as all are here."""
        return reduce(x, self.tensor)

    def shard_mask(self, mask: Tensor, x: Tensor) -> Tensor:
        """Of a mask over whole sequences the own part; one over the own positions as it is.

        Raises:
            ValueError: a mask of any other length.
        """
        held = x.shape[-2]
        if mask.shape[-1] == held * self.tensor.size:
            return own_slice(mask, -1, self.tensor)
        if mask.shape[-1] != held:
            raise UserValueError(
                f"a token mask of length {mask.shape[-1]} for {held} positions on each of {self.tensor.size} tensor "
                f"ranks; legal with sequence_parallel=True: {held * self.tensor.size} (whole sequences) or {held}"
            )
        return mask


def reached(loss: Tensor) -> tuple[set[Tensor], set[Tensor]]:
    """The parameters that a loss reaches directly, and those that it reaches through sequence-sharded activations.

    Gradients of the first are whole on every tensor rank. Those of the second are partial sums, of the own tokens.
    """
    direct, borders = _walk([loss.grad_fn], stop=True)
    behind, _ = _walk([following for node in borders for following, _ in node.next_functions], stop=False)
    return direct, behind


def reached_directly(loss: Tensor) -> set[Tensor]:
    """The first of :func:`reached`, which is found much faster."""
    return _walk([loss.grad_fn], stop=True)[0]


def _walk(start: list[Any], stop: bool) -> tuple[set[Tensor], list[Any]]:
    leaves, borders, seen = set(), [], set()
    open_nodes = [node for node in start if node is not None]
    while open_nodes:
        node = open_nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if stop and isinstance(node, BORDERS):
            borders.append(node)
            continue
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.add(leaf)
        open_nodes += [following for following, _ in node.next_functions if following is not None]
    return leaves, borders
