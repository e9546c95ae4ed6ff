"""The seam of the experts' computation: what a layer's experts are to all that runs, watches and shards them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator

from torch import Tensor

from lightning_tex.moe.dispatch import Arrived
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.sharding import TexModule

# D model width, E experts, e experts held here, t own tokens


class HeldExperts(TexModule):
    """E experts, e of them on each rank of the expert axis: [t, D] tokens -> [t, D] sums over a token's choices.

    Every parameter is stacked over experts, dim 0, and declared in ``shard_dims``.

    Args:
        dim: D.
        num_experts: E; divisible by the expert axis.
    """

    axes = ("expert", "expert_tensor")

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.dim, self.num_experts = dim, num_experts

    @abstractmethod
    def forward(self, arrived: Arrived, beside: Callable[[], object] | None = None) -> Tensor:
        """What the experts give for the rows that come to them, summed over each token's choices: [t, D].

        Args:
            arrived: the tokens, and what brings their rows.
            beside: is run while the last rows are on their way home; its backward while gradients are on their way.
        """

    @abstractmethod
    def own_outputs(self, arrived: Arrived) -> Iterator[Tensor]:
        """What the experts held here give by themselves, one after another: partial sums over expert_tensor."""

    def require_shardable(self, layer: str, layout: Layout) -> None:
        """Raise ``ValueError`` naming the layer, its option and legal values if a layout cannot have these experts."""
        if self.num_experts % layout.expert:
            legal = Layout.legal_expert_sizes(layout.world, layout.expert_tensor, [self.num_experts])
            raise UserValueError(
                f"{layer}: num_experts={self.num_experts} is not divisible by expert_parallel_size={layout.expert}; "
                f"legal sizes on {layout.world} ranks: {', '.join(map(str, legal))}"
            )

    @property
    def held(self) -> range:
        """Numbers of the experts that are here."""
        here = self.num_experts // self.expert.size
        return range(self.expert.rank * here, (self.expert.rank + 1) * here)
