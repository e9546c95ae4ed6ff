"""Sigmoid scores, and a bias that balances experts without an auxiliary loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tex.moe.router import Router
from lightning_tex.moe.tokens import Tokens
from lightning_tex.parallel.collectives import all_reduce
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.initialization import by_index, has_values

# T tokens, E experts


class SigmoidRouter(Router):
    """A sigmoid of each expert; the k largest of it and a bias (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    The bias, ``correction_bias`` [E], decides which experts are chosen and enters no weight. It is no parameter but a
    saved buffer in fp32. With a rate, each optimizer step raises it for experts that were chosen less often than the
    mean and lowers it for others: balance without an auxiliary loss (set ``load_balance_coefficient=0``).

    Args:
        args, kwargs: as of :class:`Router`; groups are chosen by their best two experts.
        bias_update_rate: by how much; DeepSeek-V3 takes 0.001. 0: the bias stays.

    Raises:
        ValueError: a negative rate.
    """

    group_score = "top2_sum"
    correction_bias: Tensor

    def __init__(self, dim: int, num_experts: int, *args: Any, bias_update_rate: float = 0.0, **kwargs: Any) -> None:
        super().__init__(dim, num_experts, *args, **kwargs)
        if bias_update_rate < 0:
            raise UserValueError(f"bias_update_rate={bias_update_rate}; legal: 0, or above")
        self.bias_update_rate = bias_update_rate
        self._chosen: Tensor | None = None
        self.register_buffer("correction_bias", torch.zeros(num_experts, dtype=torch.float32))

    @by_index
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "correction_bias" in self._buffers and has_values(self.correction_bias):
            nn.init.zeros_(self.correction_bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SigmoidRouter:
        kept = self.correction_bias
        super()._apply(fn, recurse)
        # A module that is cast casts its buffers; steps of this one would vanish in 16 bits.
        if self.correction_bias.dtype != kept.dtype:
            self.correction_bias = kept.to(self.correction_bias.device)
        return self

    def score(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def chose(self, counts: Tensor) -> None:
        if self.bias_update_rate:
            self._chosen = counts if self._chosen is None else self._chosen + counts

    @torch.no_grad()
    def step_is_over(self, taken: bool) -> None:
        chosen, self._chosen = self._chosen, None
        if chosen is not None and taken:
            total = all_reduce(self.activation_layout.total(chosen), self.data)
            # In whole numbers: every layout decides alike.
            self.correction_bias += self.bias_update_rate * (total.sum() - total * len(total)).sign()

    def prefer(self, scores: Tensor, tokens: Tokens) -> Tensor:
        return scores + self.correction_bias

    def balance(self, scores: Tensor) -> Tensor:
        """Scores relative to a token's sum of them (Eq. 19)."""
        return scores / (scores.sum(-1, keepdim=True) + torch.finfo(scores.dtype).tiny)
