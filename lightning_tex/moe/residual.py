"""A dense MLP beside the experts, mixed with them by a learned coefficient (DeepSpeed-MoE, arXiv 2201.05596, 4.1)."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_tex.layers.mlp import Activation, ParallelMLP
from lightning_tex.moe.router import Route

# T tokens, D model width


class ResidualBranch(ParallelMLP):
    """The MLP that every token uses, c2 of it beside c1 of the experts: [.., dim] -> [.., dim].

    (c1, c2) = softmax(mix(x)), two numbers a token. An experts' output is a sum times weights, so that c1 multiplies
    the weights: nothing of the experts' output has to be kept.

    Args:
        dim: model width D.
        hidden_dim: hidden width; divisible by the tensor axis.
        activation: as of the experts.
    """

    def __init__(self, dim: int, hidden_dim: int, activation: Activation = "gelu") -> None:
        super().__init__(dim, hidden_dim, activation)
        # It acts on tokens as they lie between layers, and is whole on every rank.
        self.mix = nn.Linear(dim, 2)

    def shares(self, x: Tensor) -> tuple[Tensor, Tensor]:  # [.., D] -> [.., 1] twice
        """c1 and c2."""
        of_experts, own = self.mix(x).softmax(-1).split(1, -1)
        return of_experts, own

    def of_experts(self, route: Route, share: Tensor) -> Route:
        """The route with its experts' outputs times c1. [.., 1]"""
        return route._replace(weights=route.weights * share.reshape(-1, 1))

    def scaled(self, x: Tensor, share: Tensor) -> Tensor:  # [.., D], [.., 1] -> [.., D]
        """The MLP times c2."""
        return self(x) * share
