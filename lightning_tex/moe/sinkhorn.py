"""Experts by the balanced assignment of Sinkhorn's iteration, in training."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_tex.moe.softmax_routers import SoftmaxRouter
from lightning_tex.moe.tokens import Tokens
from lightning_tex.parallel.collectives import all_reduce
from lightning_tex.parallel.errors import UserValueError

# T tokens, E experts

# Of an expert that no token gives anything, and of a token that has nothing to give.
_LEAST = 1e-30


class SinkhornRouter(SoftmaxRouter):
    """The k largest of scores that are balanced over the micro-step first (S-BASE, arXiv 2202.01169, section 2.2).

    In training, rows and columns of the scores are scaled in turn, so that every token gives as much as every other and
    every expert gets as much: the k largest of what comes of it are chosen, without gradient, and the experts' outputs
    weighted by the softmax. The columns' sums are over all tokens of the micro-step, on whatever ranks they are, in
    fp64: choices do not depend on the layout. They do depend on what follows a token. In evaluation the k largest
    scores are chosen, which is causal.

    Args:
        args, kwargs: as of :class:`Router`.
        iterations: of the scaling; each is a sum of E numbers over data.

    Raises:
        ValueError: no iteration.
    """

    def __init__(self, dim: int, num_experts: int, *args: Any, iterations: int = 8, **kwargs: Any) -> None:
        super().__init__(dim, num_experts, *args, **kwargs)
        if iterations < 1:
            raise UserValueError(f"iterations={iterations} of the router 'sinkhorn'; legal: 1, or more")
        self.iterations = iterations

    def prefer(self, scores: Tensor, tokens: Tokens) -> Tensor:
        if not self.training:
            return scores
        scores = scores.double()
        counted = scores if tokens.mask is None else scores * tokens.mask[:, None]
        columns = scores.new_ones(scores.shape[1])
        for _ in range(self.iterations):
            rows = (scores @ columns).clamp(min=_LEAST)
            sums = self.activation_layout.total((counted / rows[:, None]).sum(0))
            columns = 1 / all_reduce(sums, self.data).clamp(min=_LEAST)
            columns = columns / columns.max()
        return scores * columns
