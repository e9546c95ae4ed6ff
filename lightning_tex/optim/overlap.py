"""Gradients leave for their owners while the backward still runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_tex.collectives import all_reduce
from lightning_tex.optim.flat import FlatBuffer
from lightning_tex.topology import Axis


class Overlap:
    """Starts the reduction of each buffer as soon as a backward has put the last of its gradients in.

    Buffers start in one fixed order on all ranks. It is the order in which they became complete in the first
    backward, on the rank where that was last; one that stayed incomplete on some rank (a parameter without gradient)
    comes after all others and holds up none of them. The first backward itself overlaps nothing.

    Args:
        buffers: what is reduced.
        world: the ranks that must agree.
        counted: what is sent inside counts as the optimizer's.
        name: a parameter's name, for messages.
    """

    def __init__(
        self,
        buffers: list[FlatBuffer],
        world: Axis,
        counted: Callable[[], AbstractContextManager[None]],
        name: Callable[[nn.Parameter], str],
    ) -> None:
        self.buffers, self.world, self._counted, self._name = list(buffers), world, counted, name
        self._missing: dict[FlatBuffer, set[Tensor]] | None = None
        self._completed: list[FlatBuffer] | None = None
        self._agreed = False
        self._hooks: list[RemovableHandle] = [
            entry.parameter.register_post_accumulate_grad_hook(partial(self._arrived, buffer))
            for buffer in buffers
            for entry in buffer.entries
        ]

    @contextmanager
    def during(self) -> Iterator[None]:
        """Inside runs the step's last backward, and only one."""
        self._missing = {buffer: {entry.parameter for entry in buffer.entries} for buffer in self.buffers}
        self._completed = []
        try:
            yield
        finally:
            self._missing = None

    def _arrived(self, buffer: FlatBuffer, parameter: nn.Parameter) -> None:
        if self._missing is None or self._completed is None:
            return
        if buffer.reducing:
            raise RuntimeError(
                f"a gradient of {self._name(parameter)} arrived after it was reduced: it is computed in several parts, "
                "as reentrant checkpoints do; legal: torch.utils.checkpoint(..., use_reentrant=False), or "
                "TexMoEStrategy(activation_checkpointing=...)"
            )
        missing = self._missing[buffer]
        missing.discard(parameter)
        if missing:
            return
        self._completed.append(buffer)
        if self._agreed:
            with self._counted():
                self._start_while(lambda waiting: waiting in self._completed)  # type: ignore[operator]

    def start_all(self) -> None:
        """Start what has not started; collective."""
        if not self._agreed and self._completed is not None:
            self._agree(self._completed)
        self._start_while(lambda _: True)

    def _start_while(self, ready: Callable[[FlatBuffer], bool]) -> None:
        for buffer in self.buffers:
            if not buffer.reducing:
                if not ready(buffer):
                    return
                buffer.start_reduction()

    def _agree(self, completed: list[FlatBuffer]) -> None:
        places = [completed.index(b) if b in completed else len(self.buffers) for b in self.buffers]
        device = self.buffers[0].parameters.device if self.buffers else None
        places = all_reduce(torch.tensor(places, device=device), self.world, "max", "exchange_counts").tolist()
        self.buffers = [
            buffer for _, buffer in sorted(zip(places, self.buffers, strict=True), key=lambda pair: pair[0])
        ]
        self._agreed = True

    def release(self) -> None:
        """Take the hooks from the parameters."""
        for hook in self._hooks:
            hook.remove()
