"""Low-rank adapters of linear layers (LoRA, arXiv 2106.09685), sharded as the layers are that they act beside."""

from __future__ import annotations

import math
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tex.parallel.initialization import by_index, has_values, init_uniform_
from lightning_tex.parallel.rank_random_state import rank_random_state
from lightning_tex.parallel.sharding import TexModule

# r rank, much smaller than in and out


class LowRank(TexModule):
    """What two thin matrices add to a matrix W [.., out, in]: scale * B A, of A [.., r, in] and B [.., out, r].

    A is drawn as ``torch.nn.Linear`` draws, B is 0: at first nothing is added.

    Args:
        shape: of W, whole.
        rank: r.
        scale: of the product.
    """

    def __init__(self, shape: tuple[int, ...], rank: int, scale: float) -> None:
        super().__init__()
        *stacked, out_features, in_features = shape
        self.in_features, self.scale = in_features, scale
        self.a = nn.Parameter(torch.empty(*stacked, rank, in_features))
        self.b = nn.Parameter(torch.empty(*stacked, out_features, rank))
        self.reset_parameters()

    @by_index
    def reset_parameters(self) -> None:
        """A uniform within 1/sqrt(in), by global index; B zeros."""
        init_uniform_(self.a, 1 / math.sqrt(self.in_features), self.boxes()["a"])
        if has_values(self.b):
            nn.init.zeros_(self.b)

    @torch.no_grad()
    def merged(self, held: Tensor) -> Tensor:
        """A rank's part of W with what is added to it, in fp32 at least. Communicates nothing."""
        wide = torch.promote_types(held.dtype, torch.float32)
        return torch.add(held.to(wide), self.b.to(wide) @ self.a.to(wide), alpha=self.scale)

    def extra_repr(self) -> str:
        return f"rank={self.a.shape[-2]}, scale={self.scale:g}"


class Adapter(LowRank):
    """An adapter of a linear layer, whose product is computed beside that of W: scale * B (A x).

    Alone in one process it is that of PEFT. W is never changed, so that small updates are not lost where it has 16
    bits.

    Args:
        shape: of W: [out, in].
        rank: r.
        scale: of the product.
        dropout: probability with which elements of x are zeroed in training, for the adapter alone.
    """

    def __init__(self, shape: tuple[int, ...], rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(shape, rank, scale)
        self.dropout = dropout

    def inner(self, x: Tensor) -> Tensor:  # [.., in] -> [.., r]
        """``scale * A x``: with B it gives what is added."""
        return F.linear(F.dropout(x, self.dropout, self.training), self.a) * self.scale

    def forward(self, x: Tensor) -> Tensor:  # [.., in] -> [.., out]
        return F.linear(self.inner(x), self.b)


class ColumnAdapter(Adapter):
    """That of a matrix whose rows are sharded over tensor: A is whole on every rank, B sharded as W is.

    A rank's gradient of A is the part of it that comes from its own columns of the output.
    """

    shard_dims = {"b": {"tensor": 0}}
    partial_gradients = ("a",)


class RowAdapter(Adapter):
    """That of a matrix whose columns are sharded over tensor: A is sharded as W is, B whole on every rank.

    What it adds is a partial sum as the layer's own product is, and both are summed at once: no communication is added.
    A rank's gradient of B is the part of it that comes from its own part of the input. Ranks draw different dropouts,
    of the parts of the input that they hold.
    """

    shard_dims = {"a": {"tensor": 1}}
    partial_gradients = ("b",)

    def inner(self, x: Tensor) -> Tensor:  # [.., in/tensor] -> [.., r]
        with rank_random_state(self.tensor, enabled=self.training and self.dropout > 0):
            return super().inner(x)


class AdaptedLinear(nn.Linear):
    """A ``torch.nn.Linear``, whole on every rank, with an adapter that is whole, too."""

    adapter: Adapter

    @classmethod
    def of(cls, linear: nn.Linear, adapter: Adapter) -> Self:
        """With a layer's own parameters."""
        with torch.device("meta"):
            adapted = cls(linear.in_features, linear.out_features, linear.bias is not None)
        adapted.weight, adapted.bias, adapted.adapter = linear.weight, linear.bias, adapter
        return adapted

    def forward(self, x: Tensor) -> Tensor:  # [.., in] -> [.., out]
        return super().forward(x) + self.adapter(x)
