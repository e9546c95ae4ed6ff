"""Gradients of which a rank keeps its own part alone: ZeRO 2."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_tex.optim.flat import Entry, FlatBuffer
from lightning_tex.optim.gradients import Gradients
from lightning_tex.parallel.in_place_collectives import gather_in_place, own_part, reduce_scatter_in_place

_AT_ONCE = 1 << 18  # elements that are compared or converted at once, in temporary memory


class ShardedGradients(Gradients):
    """Only the own part is kept, in fp32 or more; a backward's gradients leave at its end (ZeRO 2).

    What a backward gives is moved to a flat tensor that lives until it is reduced, and ``.grad`` is ``None``.
    """

    frees = True

    def __init__(self, buffer: FlatBuffer) -> None:
        super().__init__(buffer)
        dtype = torch.promote_types(buffer.parameters.dtype, torch.float32)
        self.sum = torch.zeros_like(buffer.own, dtype=dtype)
        self._flat: Tensor | None = None
        self._exposed: Tensor | None = None
        self.zero()

    @property
    def own(self) -> Tensor:
        if self._exposed is not None:
            self._take_up_changes(own_part(self._exposed, self.buffer.owners))
        return self.sum

    def _take_up_changes(self, shown: Tensor) -> None:
        """Take up what somebody changed in the gradients that were shown, rounded to the parameters' dtype."""
        for kept, now in zip(self.sum.split(_AT_ONCE), shown.split(_AT_ONCE), strict=True):
            kept.copy_(torch.where(kept.to(now.dtype) == now, kept, now))

    def clamp(self, limit: float | Tensor) -> None:
        super().clamp(limit)
        self._show(lambda shown: shown.clamp_(-limit, limit))  # type: ignore[arg-type]

    def multiply(self, factor: float | Tensor) -> None:
        super().multiply(factor)
        self._show(lambda shown: shown.mul_(factor))

    def _show(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._exposed is not None:
            change(self._exposed)
            own_part(self._exposed, self.buffer.owners).copy_(self.sum)  # or what is kept would look changed

    @property
    def memory(self) -> Tensor:
        return self.sum

    def zero(self, set_to_none: bool = True) -> None:
        """Forget the sum, and every ``.grad``."""
        if self._reduction is not None:  # sent in a step that was given up
            self._reduction.wait()
        self._reduction = self._flat = self._exposed = None
        self.started, self.divisor = False, 1.0
        self.sum.zero_()
        for entry in self.buffer.entries:
            entry.parameter.grad = None

    def arrived(self, entry: Entry) -> None:
        """Take a gradient up, and its memory from the parameter."""
        grad = entry.parameter.grad
        if grad is not None:
            if self._flat is None:
                self._flat = torch.zeros_like(self.buffer.parameters)
            self.buffer.view(self._flat, entry).add_(grad)
            entry.parameter.grad = None

    @property
    def waiting(self) -> bool:
        return self._flat is not None or any(entry.parameter.grad is not None for entry in self.buffer.entries)

    def start(self) -> None:
        for entry in self.buffer.entries:
            self.arrived(entry)  # of those that somebody set without a backward
        if self._flat is None:
            self._flat = torch.zeros_like(self.buffer.parameters)
        self._divide(self._flat)
        self._reduction = reduce_scatter_in_place(self._flat, self.buffer.owners)

    def finish(self) -> None:
        if self._reduction is not None:
            assert self._flat is not None
            self._reduction.wait()
            self._add(own_part(self._flat, self.buffer.owners))
            self._reduction = self._flat = None

    def _add(self, part: Tensor) -> None:
        """A CPU piece by piece: of what it adds it makes a copy in the dtype of the sum."""
        at_once = len(part) if part.is_cuda else _AT_ONCE
        for kept, added in zip(self.sum.split(at_once), part.split(at_once), strict=True):
            kept.add_(added)

    def expose(self) -> None:
        whole = torch.zeros_like(self.buffer.parameters)
        own_part(whole, self.buffer.owners).copy_(self.sum)
        gather_in_place(whole, self.buffer.owners).wait()
        for entry in self.buffer.entries:
            entry.parameter.grad = self.buffer.view(whole, entry)
        self._exposed = whole
