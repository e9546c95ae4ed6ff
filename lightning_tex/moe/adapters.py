"""Low-rank adapters of the experts' stacked matrices, spread and sharded as these are."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_tex.layers.adapters import LowRank
from lightning_tex.parallel.collectives import enter

# E experts, e held here, r rank


class ExpertAdapter(LowRank):
    """What is added to one of the experts' matrices: W [E, out, in] + scale * B A, of A [E, r, in] and B [E, out, r].

    The sum is made in every forward, of the experts held here, and takes the place of W in the products: they cost as
    much as without, the sum and its backward 4 e r out in multiplications, whatever the number of rows. It is kept from
    the forward to the backward, where its whole gradient exists for a moment: two matrices of W's size in the dtype of
    the products, of one block at a time under activation checkpointing. Where that has 16 bits the experts compute as
    the merged ones would.

    The factor that expert_tensor does not shard has an all-reduce of its gradient over that axis in the backward.
    """

    axes = ("expert", "expert_tensor")

    def forward(self, weight: Tensor) -> Tensor:  # [e, out, in] -> [e, out, in]
        a, b = (factor.to(weight.dtype) for factor in self.entered())
        return torch.baddbmm(weight, b, a, alpha=self.scale)

    def entered(self) -> tuple[Tensor, Tensor]:
        """A and B inside the region that is sharded over expert_tensor."""
        raise NotImplementedError


class ExpertUpAdapter(ExpertAdapter):
    """That of gate or up, whose rows are sharded over expert_tensor: B is, too."""

    shard_dims = {"a": {"expert": 0}, "b": {"expert": 0, "expert_tensor": 1}}

    def entered(self) -> tuple[Tensor, Tensor]:
        return enter(self.a, self.expert_tensor), self.b


class ExpertDownAdapter(ExpertAdapter):
    """That of down, whose columns are sharded over expert_tensor: A is, too."""

    shard_dims = {"a": {"expert": 0, "expert_tensor": 2}, "b": {"expert": 0}}

    def entered(self) -> tuple[Tensor, Tensor]:
        return self.a, enter(self.b, self.expert_tensor)
