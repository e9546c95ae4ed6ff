"""Norms of queries and keys, inside attention's region that is sharded over the tensor axis."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_tex.layers.norm import RMSNorm
from lightning_tex.parallel.collectives import enter, reduce
from lightning_tex.parallel.initialization import by_index
from lightning_tex.parallel.sharding import TexModule

# B sequences, S positions, W width of all heads, w of those held here (W/tensor), d head width

# "head": one norm of d weights for all heads (Qwen3). "full": one over all heads together (OLMoE).
QKNorm = Literal["head", "full"]


class HeadNorm(RMSNorm):
    """Each head normed by itself, with weights that all heads share: [.., w] -> [.., w].

    A rank's gradient of the weights is that of its own heads.

    Args:
        head_dim: d.
        eps: added to the mean square.
    """

    partial_gradients = ("weight",)

    def __init__(self, head_dim: int, eps: float = 1e-5) -> None:
        super().__init__(head_dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unflatten(-1, (-1, self.normalized_shape[-1]))).flatten(-2)


class ShardedRMSNorm(TexModule):
    """An RMSNorm of columns that are sharded over the tensor axis: [.., w] -> [.., w].

    Alone in one process it is :class:`RMSNorm`. Forward all-reduces the sum of squares of each row over tensor, and
    backward the gradient of it.

    Args:
        dim: W; divisible by the tensor axis.
        eps: added to the mean square.
    """

    full_precision = True
    shard_dims = {"weight": {"tensor": 0}}

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    @by_index
    def reset_parameters(self) -> None:
        """Ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(self.weight.dtype, torch.float32))
        squares = enter(reduce(wide.square().sum(-1, keepdim=True), self.tensor), self.tensor)
        return (wide * (squares / self.dim + self.eps).rsqrt() * self.weight).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


def make_qk_norms(
    kind: QKNorm | None, num_heads: int, num_kv_heads: int, head_dim: int, eps: float
) -> nn.ModuleDict | None:
    """The norms of ``query`` and ``key``: [.., w] -> [.., w] each."""
    if kind is None:
        return None
    heads = {"query": num_heads, "key": num_kv_heads}
    if kind == "head":
        return nn.ModuleDict({name: HeadNorm(head_dim, eps) for name in heads})
    return nn.ModuleDict({name: ShardedRMSNorm(count * head_dim, eps) for name, count in heads.items()})
