"""A buffer's gradients, and how the ranks that hold replicas combine them: one class for each way of ZeRO.

They are reduced in the parameters' dtype. ZeRO 0 and 1 accumulate micro-batches in it as well, ZeRO 2 in fp32. A sum of
fp16 gradients could exceed 65504 where their average does not, so these are divided before they are sent: by a power
of two, which rounds nothing. What is left of the division is in fp32, on the way through the step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor

from lightning_tex.optim.flat import Entry, FlatBuffer
from lightning_tex.parallel.in_place_collectives import (
    Started,
    gather_in_place,
    own_part,
    reduce_scatter_in_place,
    sum_in_place,
)


class Gradients(ABC):
    """The gradients of one buffer's parameters.

    In a step: backwards fill ``.grad``; :meth:`start` and :meth:`finish` send and sum; :meth:`combine` makes of that
    the gradients to step by. What is owned then is ``own / divisor``.

    Args:
        buffer: the parameters.

    Attributes:
        frees: memory is given back by :meth:`finish`.
        started: between :meth:`start` and the end of the step's reduction.
    """

    frees = False

    def __init__(self, buffer: FlatBuffer) -> None:
        self.buffer = buffer
        self.divisor = 1.0
        self.started = False
        self._reduction: Started | None = None

    @property
    @abstractmethod
    def own(self) -> Tensor:
        """The own part: a sum over replicas, still to be divided by ``divisor``. [n]"""

    @property
    @abstractmethod
    def memory(self) -> Tensor:
        """What is kept between steps."""

    @property
    def reducing(self) -> bool:
        """Whether the gradients are on their way to their owners."""
        return self._reduction is not None

    @abstractmethod
    def zero(self, set_to_none: bool = True) -> None:
        """Begin a step, with every ``.grad`` being ``None``, or zero where that is possible."""

    def arrived(self, entry: Entry) -> None:  # noqa: B027
        """A backward has put a parameter's gradient into its ``.grad``."""

    @property
    def waiting(self) -> bool:
        """Whether a backward left something that :meth:`start` has not sent."""
        return False

    @abstractmethod
    def start(self) -> None:
        """Send the gradients, which are complete, to their owners. Collective; :meth:`finish` waits."""

    @abstractmethod
    def finish(self) -> None:
        """Wait for what :meth:`start` began."""

    @abstractmethod
    def expose(self) -> None:
        """Make every ``.grad`` the combined gradient; collective."""

    def combine(self, whole: bool, direct: Set[Tensor] = frozenset()) -> None:
        """Combine the own part over everything that is left; once per step, collective.

        Args:
            whole: make every ``.grad`` the combined gradient, not only its own part.
            direct: parameters whose gradients are whole on every rank of the buffer's ``partial_axis``; the others' are
                partial sums and are summed over it.
        """
        if self.buffer.partial_axis.size > 1:
            parts = [self.own[self._within_own(entry)] for entry in self.buffer.entries if entry.parameter in direct]
            whole_gradients = [part.clone() for part in parts]
            sum_in_place(self.own, self.buffer.partial_axis).wait()
            for part, gradient in zip(parts, whole_gradients, strict=True):
                part.copy_(gradient)
        self.divisor = self.buffer.divisor / self._divided_before
        if whole:
            self.own.div_(self.divisor)
            self.divisor = 1.0
            self.expose()

    def settle(self) -> None:
        """Divide the combined own part, which is left to the step else."""
        self.own.div_(self.divisor)
        self.divisor = 1.0

    @property
    def _divided_before(self) -> int:
        """By what gradients are divided before they are summed."""
        summed = self.buffer.replicas.size * self.buffer.partial_axis.size
        return 1 << (summed - 1).bit_length() if self.buffer.parameters.dtype == torch.float16 else 1

    def _divide(self, gradients: Tensor) -> None:
        if self._divided_before > 1:
            gradients.div_(self._divided_before)

    def _within_own(self, entry: Entry) -> slice:
        length, start = len(self.own), self.buffer.own_start
        return slice(*(min(max(at - start, 0), length) for at in (entry.start, entry.stop)))

    def clamp(self, limit: float | Tensor) -> None:
        """Clamp every element of the combined gradient, as far as it is here, to [-limit, limit]."""
        bound: Any = limit * self.divisor
        self.combined.clamp_(-bound, bound)

    def multiply(self, factor: float | Tensor) -> None:
        """Multiply the combined gradient, as far as it is here."""
        self.combined.mul_(factor)

    @property
    def combined(self) -> Tensor:
        """The own part or, where that is shown, all of the combined gradient. [n]"""
        return self.own

    def bad_entry(self) -> Entry | None:
        """The first parameter that has an infinity or NaN in the own part."""
        own = self.own
        for entry in self.buffer.entries:
            if not bool(torch.isfinite(own[self._within_own(entry)]).all()):
                return entry
        return None


class FullGradients(Gradients):
    """Gradients of all parameters in one flat tensor (ZeRO 0 and 1).

    A ``.grad`` is ``None`` until a backward gives one, which is copied there and from then on a view of it. ZeRO 1
    reduce-scatters it in place into the own part, and leaves the other parts undefined. Under ZeRO 0 everything is
    owned, and it is all-reduced.
    """

    def __init__(self, buffer: FlatBuffer) -> None:
        super().__init__(buffer)
        self.flat = torch.zeros_like(buffer.parameters)
        self._own = own_part(self.flat, buffer.owners)
        self._shown = False
        self.views = {entry: buffer.view(self.flat, entry) for entry in buffer.entries}
        for entry in self.views:
            entry.parameter.grad = None

    @property
    def own(self) -> Tensor:
        return self._own

    @property
    def memory(self) -> Tensor:
        return self.flat

    def zero(self, set_to_none: bool = True) -> None:
        """Set all gradients to zero."""
        self.finish()  # what was sent in a step that was given up
        self.started, self.divisor, self._shown = False, 1.0, False
        self.flat.zero_()
        for entry, view in self.views.items():
            entry.parameter.grad = None if set_to_none else view

    def arrived(self, entry: Entry) -> None:
        """Take up a gradient that is not in its place."""
        grad, view = entry.parameter.grad, self.views[entry]
        if grad is not None and grad is not view and not grad.requires_grad:
            view.copy_(grad)
            entry.parameter.grad = view

    def collect(self) -> None:
        """Take up the gradients that are not in their place, set by somebody or having a graph; zero where none is."""
        for entry, view in self.views.items():
            grad = entry.parameter.grad
            if grad is view:
                continue
            if grad is None:
                view.zero_()
            else:
                view.copy_(grad)
            entry.parameter.grad = view

    @property
    def combined(self) -> Tensor:
        return self.flat if self._shown else self._own

    def start(self) -> None:
        self._shown = False
        self.collect()
        self._divide(self.flat)
        buffer = self.buffer
        if buffer.owners.size == buffer.replicas.size:
            self._reduction = reduce_scatter_in_place(self.flat, buffer.owners)
        else:
            self._reduction = sum_in_place(self.flat, buffer.replicas)

    def finish(self) -> None:
        if self._reduction is not None:
            self._reduction.wait()
            self._reduction = None

    def expose(self) -> None:
        gather_in_place(self.flat, self.buffer.owners).wait()
        self._shown = True
