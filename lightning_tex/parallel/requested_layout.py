"""The sizes that a user asks for, and the layout that they give on the world that there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lightning_tex.parallel.layout import Layout, divisors


@dataclass(frozen=True)
class RequestedLayout:
    """Sizes as for :meth:`Layout.resolve`, which checks them.

    Args:
        tensor_parallel_size, expert_parallel_size, expert_tensor_parallel_size, duplicate_token_dropping: as there.
        elastic: on a world that does not allow a size, take the largest divisor of it that the world does, first of
            tensor, then of expert.
    """

    tensor_parallel_size: int = 1
    expert_parallel_size: int | Literal["auto"] = "auto"
    expert_tensor_parallel_size: int | None = None
    duplicate_token_dropping: bool = True
    elastic: bool = False

    def resolve(self, world: int, num_experts: Sequence[int] = ()) -> Layout:
        """The layout on ``world`` ranks of a model whose MoE layers have so many experts.

        Raises:
            ValueError: sizes that are not legal.
        """
        sizes = self._fitted(world, num_experts) if self.elastic else self
        return Layout.resolve(
            world,
            sizes.tensor_parallel_size,
            sizes.expert_parallel_size,
            sizes.expert_tensor_parallel_size,
            num_experts,
            sizes.duplicate_token_dropping,
        )

    def _fitted(self, world: int, num_experts: Sequence[int]) -> RequestedLayout:
        tensor = _largest(self.tensor_parallel_size, Layout.legal_tensor_sizes(world))
        folded = self.expert_tensor_parallel_size == 1
        expert = self.expert_parallel_size
        if expert != "auto":
            legal = Layout.legal_expert_sizes(world, 1 if folded else tensor, num_experts)
            expert = _largest(expert, legal)
        # Anything but 1 and the tensor size is refused, as it is on the world that the sizes were written for.
        sharded = self.expert_tensor_parallel_size in (None, self.tensor_parallel_size) and not folded
        expert_tensor = None if sharded else self.expert_tensor_parallel_size
        return replace(
            self,
            tensor_parallel_size=tensor,
            expert_parallel_size=expert,
            expert_tensor_parallel_size=expert_tensor,
        )

    def departures(self, layout: Layout) -> list[str]:
        """What a layout has in another size than was asked for, each ``name asked -> size``."""
        asked = {"tensor": self.tensor_parallel_size, "expert": self.expert_parallel_size}
        sizes = {"tensor": layout.tensor, "expert": layout.expert}
        return [
            f"{name}_parallel_size {size} -> {sizes[name]}"
            for name, size in asked.items()
            if size not in ("auto", sizes[name])
        ]


def _largest(size: int, legal: Sequence[int]) -> int:
    return max((n for n in divisors(size) if n in legal), default=size)
