"""The expert that every token uses, beside those that a router chooses (DeepSeekMoE, arXiv 2401.06066, section 3.2)."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_tex.layers.mlp import Activation, ParallelMLP


class SharedExpert(ParallelMLP):
    """An MLP with its hidden units sharded over the tensor axis, which may scale itself: [.., dim] -> [.., dim].

    Several shared experts are one as wide as all of them.

    Args:
        dim: model width D.
        hidden_dim: hidden width of all shared experts together; divisible by the tensor axis.
        activation: as of the experts.
        gate: multiply each token's result by sigmoid(gate @ x), a number (Qwen2-MoE).
    """

    def __init__(self, dim: int, hidden_dim: int, activation: Activation = "gelu", gate: bool = False) -> None:
        super().__init__(dim, hidden_dim, activation)
        # It acts on tokens as they lie between layers, and is whole on every rank.
        self.output_gate = nn.Linear(dim, 1, bias=False) if gate else None

    def forward(self, x: Tensor) -> Tensor:  # [.., D] -> [.., D]
        y = super().forward(x)
        return y if self.output_gate is None else y * self.output_gate(x).sigmoid()
