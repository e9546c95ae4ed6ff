"""The paper's mixture-of-experts layer for one process, top to bottom: `lightning_tex.moe.MoE` computes the same.

T tokens, D model width, H hidden width, E experts, k choices per token, C capacity of an expert, n tokens of one expert
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MoEOnAPage(nn.Module):
    """[T, D] -> [T, D], and the load-balance loss. capacity_factor=None is dropless: every choice is served."""

    def __init__(self, dim: int, hidden_dim: int, num_experts: int, top_k: int, capacity_factor: float | None) -> None:
        super().__init__()
        self.top_k, self.capacity_factor = top_k, capacity_factor
        self.router = nn.Parameter(torch.randn(num_experts, dim) / math.sqrt(dim))
        self.up = nn.Parameter(torch.randn(num_experts, hidden_dim, dim) / math.sqrt(dim))
        self.down = nn.Parameter(torch.randn(num_experts, dim, hidden_dim) / math.sqrt(hidden_dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = (x @ self.router.T).softmax(-1)  # [T, E]
        weights, choices = scores.topk(self.top_k)  # [T, k], best first
        served = self.served(choices)
        y = torch.zeros_like(x)
        for e in range(len(self.up)):  # on many ranks: an all-to-all, each rank's own experts, and an all-to-all back
            token, choice = (served & (choices == e)).nonzero(as_tuple=True)  # [n], [n]
            hidden = F.gelu(x[token] @ self.up[e].T) * weights[token, choice, None]  # [n, H]
            y = y.index_add(0, token, hidden @ self.down[e].T)
        return y, self.load_balance_loss(scores, choices)

    def served(self, choices: Tensor) -> Tensor:  # [T, k] -> [T, k] boolean
        """Which choices their experts take: all first choices in token order, then all second ones; others overflow."""
        if self.capacity_factor is None:
            return torch.ones_like(choices, dtype=torch.bool)
        tokens, experts = len(choices), len(self.up)
        # A product like 1.1 * 10 lies an ulp above 11 and must not take another slot for it.
        capacity = math.ceil(self.capacity_factor * self.top_k * tokens / experts - 1e-9)
        queue = F.one_hot(choices.T.flatten(), experts)  # [k * T, E], all first choices first
        place = (queue.cumsum(0) * queue).sum(1)  # of a choice in its expert's queue, from 1
        return (place <= capacity).view(self.top_k, tokens).T

    def load_balance_loss(self, scores: Tensor, choices: Tensor) -> Tensor:
        """E * sum_e f_e P_e: the fraction of choices that fell on an expert times the mean of its scores. Even: 1."""
        experts = len(self.up)
        fraction = F.one_hot(choices, experts).to(scores.dtype).mean((0, 1))  # without gradient
        return experts * (fraction * scores.mean(0)).sum()


if __name__ == "__main__":
    torch.manual_seed(0)
    tokens = torch.randn(64, 32)
    for factor in (None, 1.0):
        layer = MoEOnAPage(dim=32, hidden_dim=64, num_experts=4, top_k=2, capacity_factor=factor)
        output, loss = layer(tokens)
        overflowed = int((~layer.served((tokens @ layer.router.T).topk(2).indices)).sum())
        name = "dropless" if factor is None else f"capacity factor {factor}"
        print(f"{name}: {tuple(output.shape)}, load-balance loss {loss:.3f}, {overflowed} of 128 choices overflowed")
