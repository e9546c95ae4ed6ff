"""Gradients leave for their owners while the backward still runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_tex.optim.flat import FlatBuffer


class Overlap:
    """Starts the reduction of each buffer as soon as a backward has put the last of its gradients in.

    Buffers start in one fixed order, whatever order they become complete in: ranks must agree. It is the order in
    which a backward completes them, last layers first.

    Args:
        buffers: in that order.
        counted: what is sent inside counts as the optimizer's.
        name: a parameter's name, for messages.
    """

    def __init__(
        self,
        buffers: list[FlatBuffer],
        counted: Callable[[], AbstractContextManager[None]],
        name: Callable[[nn.Parameter], str],
    ) -> None:
        self.buffers, self._counted, self._name = buffers, counted, name
        self._missing: dict[FlatBuffer, set[Tensor]] | None = None
        self._hooks: list[RemovableHandle] = [
            entry.parameter.register_post_accumulate_grad_hook(partial(self._arrived, buffer))
            for buffer in buffers
            for entry in buffer.entries
        ]

    @contextmanager
    def during(self) -> Iterator[None]:
        """Inside runs the step's last backward, and only one."""
        self._missing = {buffer: {entry.parameter for entry in buffer.entries} for buffer in self.buffers}
        try:
            yield
        finally:
            self._missing = None

    def _arrived(self, buffer: FlatBuffer, parameter: nn.Parameter) -> None:
        if self._missing is None:
            return
        if buffer.reducing:
            raise RuntimeError(
                f"a gradient of {self._name(parameter)} arrived after it was reduced: it is computed in several parts, "
                "as reentrant checkpoints do; legal: torch.utils.checkpoint(..., use_reentrant=False), or "
                "TexMoEStrategy(activation_checkpointing=...)"
            )
        self._missing[buffer].discard(parameter)
        with self._counted():
            self.start(complete=lambda waiting: not self._missing[waiting])  # type: ignore[index]

    def start(self, complete: Callable[[FlatBuffer], bool] = lambda _: True) -> None:
        """Start, in order, what has not started, up to the first buffer that is not complete."""
        for buffer in self.buffers:
            if not buffer.reducing:
                if not complete(buffer):
                    return
                buffer.start_reduction()

    def release(self) -> None:
        """Take the hooks from the parameters."""
        for hook in self._hooks:
            hook.remove()
