"""Gradients leave for their owners while the backward still runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_tex.optim.flat import Entry
from lightning_tex.optim.flat_sizes import BUFFERS_UNDER_WAY
from lightning_tex.optim.gradients import Gradients
from lightning_tex.parallel.collectives import all_reduce
from lightning_tex.parallel.errors import UserRuntimeError
from lightning_tex.parallel.topology import Axis


def optimizer_pass(world: Axis) -> AbstractContextManager[None]:
    """What is sent inside counts as the optimizer's."""
    return nullcontext() if world.meter is None else world.meter.optimizer_pass()


class WatchedBackward:
    """A backward whose gradients leave while it runs: which buffers it has completed, in that order.

    Args:
        buffers: the gradients of all buffers.
    """

    def __init__(self, buffers: Sequence[Gradients]) -> None:
        self.completed: list[Gradients] = []
        self._missing = {gradients: {entry.parameter for entry in gradients.buffer.entries} for gradients in buffers}

    def completes(self, gradients: Gradients, parameter: nn.Parameter) -> bool:
        """Note that a parameter's gradient is there. Whether it is the last one of its buffer."""
        missing = self._missing[gradients]
        missing.discard(parameter)
        if missing:
            return False
        self.completed.append(gradients)
        return True


class BucketOverlap:
    """Starts the reduction of each buffer's gradients as soon as a backward has put the last of them in.

    Buffers start in one fixed order on all ranks. At first it is that of the model, backwards; after the first backward
    that was watched it is the order in which they became complete, on the rank where that was last; one that stayed
    incomplete on some rank (a parameter without gradient) comes after all others and holds up none of them.

    Args:
        world: the ranks that must agree.

    Attributes:
        order: the gradients of all buffers, in the order in which they are started.
    """

    def __init__(self, world: Axis) -> None:
        self.world = world
        self.order: list[Gradients] = []
        self._order_is_agreed = False
        self._backward: WatchedBackward | None = None
        self._completed: list[Gradients] | None = None
        self._hooks: list[RemovableHandle] = []

    def add(self, buffers: Sequence[Gradients]) -> None:
        """More buffers, which come first until ranks have agreed upon an order again."""
        self.order = [*reversed(buffers), *self.order]
        self._order_is_agreed = False
        self._hooks += [
            entry.parameter.register_post_accumulate_grad_hook(partial(self._arrived, gradients, entry))
            for gradients in buffers
            for entry in gradients.buffer.entries
        ]

    def release(self) -> None:
        """Take the hooks from the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def backward_begins(self) -> None:
        """The next backward is the last one before :meth:`send_all`: buffers leave while it runs."""
        self._backward, self._completed = WatchedBackward(self.order), None

    def backward_ended(self) -> None:
        """No more buffers leave by themselves."""
        if self._backward is not None:
            self._completed = self._backward.completed
            self._backward = None

    def give_up(self) -> None:
        """Nothing is known of the backward that was under way."""
        self._backward = self._completed = None

    def send_all(self) -> None:
        """Start what has not started, and wait for everything; collective."""
        self.backward_ended()
        self._start_while(lambda _: True)
        for gradients in self.order:
            gradients.finish()
            gradients.started = False
        if self._completed is not None and not self._order_is_agreed:
            self._agree_on_order(self._completed)
        self._completed = None

    def _arrived(self, gradients: Gradients, entry: Entry, parameter: nn.Parameter) -> None:
        if gradients.started:
            raise UserRuntimeError(
                f"a gradient of {entry.sharding.name} arrived after it was reduced: it is computed in several parts, "
                "as reentrant checkpoints do, or by a backward after the last one of a step; legal: "
                "torch.utils.checkpoint(..., use_reentrant=False), or TexMoEStrategy(activation_checkpointing=...)"
            )
        gradients.arrived(entry)
        backward = self._backward
        if backward is not None and backward.completes(gradients, parameter):
            with optimizer_pass(self.world):
                self._start_while(lambda waiting: waiting in backward.completed)

    def _start_while(self, ready: Callable[[Gradients], bool]) -> None:
        for i, gradients in enumerate(self.order):
            if not gradients.started:
                if not ready(gradients):
                    return
                gradients.start()
                gradients.started = True
                if gradients.frees and i >= BUFFERS_UNDER_WAY:
                    self.order[i - BUFFERS_UNDER_WAY].finish()

    def _agree_on_order(self, completed: Sequence[Gradients]) -> None:
        last = len(self.order)
        ranks_order = [completed.index(g) if g in completed else last for g in self.order]
        device = self.order[0].own.device if self.order else None
        slowest: Tensor = all_reduce(torch.tensor(ranks_order, device=device), self.world, "max", "exchange_counts")
        by_place = sorted(zip(slowest.tolist(), self.order, strict=True), key=lambda pair: pair[0])
        self.order = [gradients for _, gradients in by_place]
        self._order_is_agreed = True
