"""Several optimizers, each over parameters of its own, as the one that automatic optimization allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_tex.optim.closure import loss_of
from lightning_tex.parallel.errors import UserValueError


class CombinedOptimizer(Optimizer):
    """Several torch optimizers as one: one step of all of them, their groups one after the other.

    Lightning's automatic optimization allows one optimizer; with this one, hidden matrices may have Muon and
    everything else AdamW:

        return CombinedOptimizer([Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=3e-4)])

    Schedulers act on all groups, or on each by its place. A group that is added later is the last optimizer's. It is a
    plain torch optimizer, also without this package's strategy.

    Args:
        optimizers: one or more, none with a parameter of another.

    Raises:
        ValueError: no optimizer, or one parameter in two of them.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        if not optimizers:
            raise UserValueError("CombinedOptimizer([]); legal: one optimizer or more, each over its own parameters")
        self.optimizers = list(optimizers)
        super().__init__([group for optimizer in self.optimizers for group in optimizer.param_groups], {})
        for optimizer in self.optimizers:
            self.state.update(optimizer.state)
        self._counts = [len(optimizer.param_groups) for optimizer in self.optimizers]
        self._share()

    def _share(self) -> None:
        """Let all have the states and groups that are this one's."""
        groups = iter(self.param_groups)
        for optimizer, count in zip(self.optimizers, self._counts, strict=True):
            optimizer.param_groups = list(islice(groups, count))
            optimizer.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the last optimizer."""
        if not hasattr(self, "_counts"):
            super().add_param_group(param_group)
            return
        self.optimizers[-1].add_param_group(param_group)
        super().add_param_group(param_group)
        self._counts[-1] += 1

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Compute the loss again, if asked, and step all optimizers."""
        loss = loss_of(closure)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def stepper_of(self, group: dict[str, Any]) -> Optimizer:
        """The optimizer that steps a group."""
        for optimizer in self.optimizers:
            if any(group is other for other in optimizer.param_groups):
                return optimizer
        raise UserValueError("the group is of no optimizer that CombinedOptimizer was made of")


def stepper_of(optimizer: Optimizer, group: dict[str, Any]) -> Optimizer:
    """The optimizer whose arithmetic steps a group: itself, or one of those that are combined in it."""
    return optimizer.stepper_of(group) if isinstance(optimizer, CombinedOptimizer) else optimizer
