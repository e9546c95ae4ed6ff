"""Gradients leave for their owners while the backward still runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_tex.errors import UserRuntimeError
from lightning_tex.optim.flat import Entry
from lightning_tex.optim.gradients import Gradients
from lightning_tex.parallel.collectives import all_reduce
from lightning_tex.parallel.topology import Axis

# Buffers on their way to their owners at once, where a buffer is freed as soon as it has arrived (ZeRO 2).
BUFFERS_UNDER_WAY = 2


class BucketOverlap:
    """Starts the reduction of each buffer's gradients as soon as a backward has put the last of them in.

    Buffers start in one fixed order on all ranks. At first it is that of the model, backwards; after the first backward
    it is the order in which they became complete, on the rank where that was last; one that stayed incomplete on some
    rank (a parameter without gradient) comes after all others and holds up none of them.

    Args:
        gradients: what is reduced.
        world: the ranks that must agree.
        counted: what is sent inside counts as the optimizer's.
        name: a parameter's name, for messages.
    """

    def __init__(
        self,
        gradients: list[Gradients],
        world: Axis,
        counted: Callable[[], AbstractContextManager[None]],
        name: Callable[[nn.Parameter], str],
    ) -> None:
        self.gradients, self.world, self._counted, self._name = gradients[::-1], world, counted, name
        self._missing: dict[Gradients, set[Tensor]] | None = None
        self._completed: list[Gradients] | None = None
        self._agreed = False
        self._hooks: list[RemovableHandle] = [
            entry.parameter.register_post_accumulate_grad_hook(partial(self._arrived, each, entry))
            for each in gradients
            for entry in each.buffer.entries
        ]

    @contextmanager
    def during(self) -> Iterator[None]:
        """Inside runs the last backward before the gradients are needed, and only one."""
        self.begin()
        try:
            yield
        finally:
            self._missing = None

    def begin(self) -> None:
        """The next backward is the last one before :meth:`start_all`."""
        self._missing = {each: {entry.parameter for entry in each.buffer.entries} for each in self.gradients}
        self._completed = []

    def _arrived(self, gradients: Gradients, entry: Entry, parameter: nn.Parameter) -> None:
        if self._missing is not None and gradients.started:
            raise UserRuntimeError(
                f"a gradient of {self._name(parameter)} arrived after it was reduced: it is computed in several parts, "
                "as reentrant checkpoints do; legal: torch.utils.checkpoint(..., use_reentrant=False), or "
                "TexMoEStrategy(activation_checkpointing=...)"
            )
        gradients.arrived(entry)
        if self._missing is None or self._completed is None:
            return
        missing = self._missing[gradients]
        missing.discard(parameter)
        if missing:
            return
        self._completed.append(gradients)
        with self._counted():
            self._start_while(lambda waiting: waiting in self._completed)  # type: ignore[operator]

    def start_all(self) -> None:
        """Start what has not started; collective."""
        self._start_while(lambda _: True)
        self._missing = None

    def finish_all(self) -> None:
        """Wait for everything; collective, once per :meth:`start_all`."""
        for each in self.gradients:
            each.finish()
            each.started = False
        if not self._agreed and self._completed is not None:
            self._agree(self._completed)

    def _start_while(self, ready: Callable[[Gradients], bool]) -> None:
        for i, each in enumerate(self.gradients):
            if not each.started:
                if not ready(each):
                    return
                each.start()
                each.started = True
                if each.frees and i >= BUFFERS_UNDER_WAY:
                    self.gradients[i - BUFFERS_UNDER_WAY].finish()

    def _agree(self, completed: list[Gradients]) -> None:
        places = [completed.index(each) if each in completed else len(self.gradients) for each in self.gradients]
        device = self.gradients[0].own.device if self.gradients else None
        places = all_reduce(torch.tensor(places, device=device), self.world, "max", "exchange_counts").tolist()
        by_place = sorted(zip(places, self.gradients, strict=True), key=lambda pair: pair[0])
        self.gradients = [each for _, each in by_place]
        self._agreed = True

    def release(self) -> None:
        """Take the hooks from the parameters."""
        for hook in self._hooks:
            hook.remove()
