"""One step's way over the windows: what was decided of it, on the device if need be, and memory that windows share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Walk:
    """What all windows of one step have in common.

    Args:
        scale: what gradients are multiplied by: a number, or a scalar on their device, which nobody looks at.
        skip: 1 where nothing is to change after all, else 0: an fp32 scalar on the device; ``None``: the step is taken.
    """

    def __init__(self, scale: float | Tensor = 1.0, skip: Tensor | None = None) -> None:
        self.scale, self.skip = scale, skip
        self._memory: Tensor | None = None
        self._inverses: dict[float, Tensor] = {}
        self._copies: tuple[list[Tensor], list[Tensor]] = [], []

    def factor(self, divisor: float) -> float | Tensor:
        """What gradients are multiplied by that are still to be divided by something."""
        return self.scale / divisor

    def inverse(self, divisor: float, device: torch.device) -> Tensor | None:
        """What kernels divide gradients by instead, an fp32 scalar; ``None``: they are as they should be."""
        if divisor not in self._inverses:
            factor = self.factor(divisor)
            if isinstance(factor, float) and factor == 1:
                return None
            if isinstance(factor, Tensor):
                inverse = factor.reciprocal().float()
            else:
                inverse = torch.full((), 1 / factor if factor else float("inf"), dtype=torch.float32, device=device)
            self._inverses[divisor] = inverse
        return self._inverses[divisor]

    def upcast(self, gradients: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Gradients in a window's dtype: themselves, or copies in memory that the next call uses again. [n] each

        To allocate it anew for every window costs CPUs more than the copies.
        """
        if gradients[0].dtype == dtype:
            return list(gradients)
        lengths = [len(gradient) for gradient in gradients]
        copies = list(self._memory_for(sum(lengths), dtype, gradients[0].device).split(lengths))
        _copy_all(gradients, copies)
        return copies

    def copy(self, values: Tensor, to: Tensor) -> None:
        """Copy values when :meth:`make_copies` is called. [n] each"""
        self._copies[0].append(values)
        self._copies[1].append(to)

    def make_copies(self) -> None:
        """Make the copies that were asked for."""
        _copy_all(*self._copies)
        self._copies = [], []

    def free(self) -> None:
        """Let go of the memory that :meth:`upcast` would use again."""
        self._memory = None

    def scale_in_place(self, gradients: list[Tensor], divisor: float) -> None:
        """Multiply gradients."""
        factor = self.factor(divisor)
        if isinstance(factor, Tensor):
            torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
        elif factor != 1:
            torch._foreach_mul_(gradients, factor)

    def _memory_for(self, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        kept = self._memory
        if kept is None or len(kept) < length or kept.dtype != dtype or kept.device != device:
            self._memory = kept = None  # before the next one is made
            self._memory = torch.empty(length, dtype=dtype, device=device)
        assert self._memory is not None
        return self._memory[:length]


def _copy_all(values: Sequence[Tensor], to: Sequence[Tensor]) -> None:
    if len(to) == 1:  # of a long one, a list is several launches
        to[0].copy_(values[0])
    elif to:
        torch._foreach_copy_(list(to), list(values))
