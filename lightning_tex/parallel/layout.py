"""Sizes of all axes and which are legal (paper, Eq. 1): arithmetic, for which no process is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from lightning_tex.parallel.errors import UserValueError

AXES = ("tensor", "data", "expert_tensor", "expert", "expert_data")
# One rank, or an array of ranks, which arithmetic serves alike.
Ranks = TypeVar("Ranks", int, np.ndarray)


@dataclass(frozen=True)
class Layout:
    """Sizes of all axes (Eq. 1): ``world = tensor * data = expert_tensor * expert * expert_data``.

    Pure arithmetic: needs no process group, so that a layout can be checked before one is made.
    """

    world: int
    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1

    @property
    def data(self) -> int:
        return self.world // self.tensor

    @property
    def expert_data(self) -> int:
        return self.world // (self.expert_tensor * self.expert)

    @classmethod
    def resolve(
        cls,
        world: int,
        tensor_parallel_size: int = 1,
        expert_parallel_size: int | Literal["auto"] = "auto",
        expert_tensor_parallel_size: int | None = None,
        num_experts: Sequence[int] = (),
        duplicate_token_dropping: bool = True,
    ) -> Layout:
        """Check the user's sizes against the world and the model, and fill in what was left open.

        Args:
            world: number of processes, G.
            tensor_parallel_size: G_tensor; must divide the world.
            expert_parallel_size: number of ranks the experts of one layer are spread over; ``"auto"`` takes the
                largest that divides the world's share and every number of experts.
            expert_tensor_parallel_size: ``None`` or the tensor size (TED), or 1 (folding).
            num_experts: number of experts of each MoE layer of the model; empty for a model without MoE.
            duplicate_token_dropping: whether equal tokens are split over tensor; folding needs it.

        Raises:
            ValueError: naming the option, the numbers and what would be legal.
        """
        tensor, expert = tensor_parallel_size, expert_parallel_size
        legal_tensor = cls.legal_tensor_sizes(world)
        if tensor not in legal_tensor:
            raise UserValueError(
                f"tensor_parallel_size={tensor} does not divide the world of {world} ranks; "
                f"legal: {_list(legal_tensor)}"
            )
        expert_tensor = tensor if expert_tensor_parallel_size is None else expert_tensor_parallel_size
        if expert_tensor not in (1, tensor):
            raise UserValueError(
                f"expert_tensor_parallel_size={expert_tensor} with tensor_parallel_size={tensor}; legal: "
                f"{tensor} (experts sharded like the rest, TED) or 1 (experts whole, folding)"
            )
        if expert_tensor < tensor and not duplicate_token_dropping:
            raise UserValueError(
                f"duplicate_token_dropping=False is not possible with expert_tensor_parallel_size=1 and "
                f"tensor_parallel_size={tensor}: each token must reach its whole expert once; legal: True, or "
                f"expert_tensor_parallel_size={tensor}"
            )
        where = f"on {world} ranks with tensor_parallel_size={tensor}"
        by_world = cls.legal_expert_sizes(world, expert_tensor)
        legal = cls.legal_expert_sizes(world, expert_tensor, num_experts)
        if expert == "auto":
            expert = max(legal) if num_experts else 1
        if not isinstance(expert, int) or expert not in by_world:
            raise UserValueError(
                f"expert_parallel_size={expert!r} is not possible {where}; legal sizes: {_list(by_world)}"
            )
        for n in num_experts:
            if n % expert:
                raise UserValueError(
                    f"num_experts={n} is not divisible by expert_parallel_size={expert}; "
                    f"legal sizes {where}: {_list(legal)}"
                )
        return cls(world, tensor, expert, expert_tensor)

    @staticmethod
    def legal_tensor_sizes(world: int, widths: Sequence[int] = ()) -> list[int]:
        """Sizes of the tensor axis that divide the world and every width."""
        return [size for size in divisors(world) if all(width % size == 0 for width in widths)]

    @staticmethod
    def legal_expert_sizes(world: int, expert_tensor: int, num_experts: Sequence[int] = ()) -> list[int]:
        """Sizes of the expert axis that divide the world's share and every number of experts."""
        return [size for size in divisors(world // expert_tensor) if all(n % size == 0 for n in num_experts)]

    def require_experts(self, num_experts: Sequence[int]) -> None:
        """Refuse an expert axis for a model in which nothing would be spread over it."""
        if self.expert > 1 and not num_experts:
            raise UserValueError(
                f"expert_parallel_size={self.expert}, but the model has no MoE layer; legal: 1 or 'auto'. "
                "Build the model with lightning_tex.moe.MoE, or leave the option out"
            )

    def axis_size(self, name: str) -> int:
        """Ranks along an axis, or of the ``world``."""
        return int(getattr(self, name))

    def coordinates(self, rank: Ranks) -> dict[str, Ranks]:
        """Coordinates of global ranks on every axis. Tensor ranks are neighbours, then expert, then expert_data."""
        return {
            "tensor": rank % self.tensor,
            "data": rank // self.tensor,
            "expert_tensor": rank % self.expert_tensor,
            "expert": rank // self.expert_tensor % self.expert,
            "expert_data": rank // (self.expert_tensor * self.expert),
        }

    def group_number(self, name: str, rank: Ranks) -> Ranks:
        """A number for the group of an axis, or of the ``world``, that global ranks belong to."""
        if name == "world":
            return 0 * rank
        coordinates = self.coordinates(rank)
        number = 0 * rank
        for other in ("tensor", "data") if name in ("tensor", "data") else AXES[2:]:
            if other != name:
                number = number * self.axis_size(other) + coordinates[other]
        return number

    def groups(self, name: str) -> list[tuple[int, ...]]:
        """All groups of ranks along one axis, each in axis order; of two groups that of the lower rank is the first."""
        return [tuple(group) for group in self._members(name).tolist()]

    def leaves_nodes(self, name: str, ranks_per_node: int) -> bool:
        """Whether groups of an axis have ranks on several nodes, of which each has that many."""
        nodes = self._members(name) // ranks_per_node
        return bool((nodes[:, 0] != nodes[:, -1]).any())

    def _members(self, name: str) -> np.ndarray:
        """Global ranks, [groups, ranks of a group]: rows and columns ascend."""
        number = self.group_number(name, np.arange(self.world))
        members = np.argsort(number, kind="stable").reshape(-1, self.axis_size(name))
        return members[np.argsort(members[:, 0])]

    def __str__(self) -> str:
        experts = f"expert {self.expert} x expert_tensor {self.expert_tensor} x expert_data {self.expert_data}"
        return f"{self.world} ranks = tensor {self.tensor} x data {self.data} = {experts}"


@dataclass(frozen=True)
class Communication:
    """Which of the ways to communicate less, or at a better time, are taken. None of them changes a result.

    Args:
        duplicate_token_dropping: tokens that all ranks of the tensor axis hold alike are split over it before they
            travel (paper section 5.1).
        fused: an all-reduce followed by a split is one reduce-scatter.
        sequence_parallel: between embedding and head, activations are split over tensor along the sequence.
        overlap: gradients are reduced while the backward still runs and, in a fit, parameters are gathered while the
            next forward does.
        expert_chunks: of a MoE layer's tokens, one of which travels while the experts compute another.
    """

    duplicate_token_dropping: bool = True
    fused: bool = True
    sequence_parallel: bool = False
    overlap: bool = True
    expert_chunks: int = 1


def divisors(n: int) -> list[int]:
    """Every whole number that divides ``n``, the smallest first."""
    return [d for d in range(1, n + 1) if n % d == 0]


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
