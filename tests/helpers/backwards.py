"""A backward as a loop of one's own runs it, announced to the optimizer."""

from __future__ import annotations

from torch import Tensor

from lightning_tex.optim import TiledOptimizer


def announced_backward(optimizer: TiledOptimizer, loss: Tensor, last: bool = False, undisturbed: bool = False) -> None:
    optimizer.backward_begins(loss, last=last, undisturbed=undisturbed)
    loss.backward()
    optimizer.backward_ended()
