"""What an optimizer that needs whole matrices keeps and takes, by the shape of a matrix, found by a trial."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from lightning_tex.optim.engine import Engine, fastest
from lightning_tex.optim.formats import Window
from lightning_tex.optim.probe import Allocations

# Sizes of a trial with values, which tell of each dim of a state which of the matrix's it is.
_SMALL = (53, 37, 29, 23)


class UnitCosts(NamedTuple):
    """Of one matrix.

    Args:
        states: bytes of states that are tensors.
        numbers: bytes of states that are one number.
        temporaries: bytes at their peak in a step.
        further: as many more, where one more such matrix is stepped in the same call.
        flops: of the products of a step.
    """

    states: int
    numbers: int
    temporaries: int
    further: int
    flops: int


class MatrixCosts:
    """What an optimizer keeps and takes with the options of one group; compared by identity.

    Args:
        optimizer, group: the user's.
    """

    def __init__(self, optimizer: Optimizer, group: dict[str, Any]) -> None:
        self._engine = Engine(optimizer)
        self._options = fastest(optimizer, group)
        self._known: dict[tuple[tuple[int, ...], torch.dtype], UnitCosts] = {}

    def of(self, shape: tuple[int, ...], dtype: torch.dtype) -> UnitCosts:
        """Those of a matrix that is updated in a dtype."""
        if (shape, dtype) not in self._known:
            with _disable_current_modes(), torch.no_grad():
                self._known[shape, dtype] = self._without_values(shape, dtype) or self._scaled(shape, dtype)
        return self._known[shape, dtype]

    def _without_values(self, shape: tuple[int, ...], dtype: torch.dtype) -> UnitCosts | None:
        """By a step of the matrix itself on the meta device; ``None``: the optimizer looks at values."""
        try:
            state, *taken = self._step(torch.empty(shape, dtype=dtype, device="meta"))
        except Exception:
            return None
        kept = [value for value in state.values() if isinstance(value, Tensor)]
        return UnitCosts(
            sum(value.nbytes for value in kept if value.dim()),
            sum(value.nbytes for value in kept if not value.dim()),
            *taken,
        )

    def _scaled(self, shape: tuple[int, ...], dtype: torch.dtype) -> UnitCosts:
        """By a step of a small one."""
        small = _SMALL[: len(shape)]
        sizes = dict(zip(small, shape, strict=True))
        state, one, further, flops = self._step(torch.linspace(-1, 1, prod(small)).view(small).to(dtype))
        larger = prod(shape) / prod(small)
        kept = [value for value in state.values() if isinstance(value, Tensor)]
        return UnitCosts(
            sum(value.itemsize * prod(sizes.get(n, n) for n in value.shape) for value in kept if value.dim()),
            sum(value.nbytes for value in kept if not value.dim()),
            int(one * larger),
            int(further * larger),
            int(flops * larger * min(shape, default=1) / min(small, default=1)),
        )

    def _step(self, values: Tensor) -> tuple[dict[str, Any], int, int, int]:
        """The states after a step; temporary bytes, those of one more matrix, and FLOPs of one that makes no states."""
        windows = [Window(nn.Parameter(values.clone(), requires_grad=False), {}) for _ in range(2)]
        taken = []
        for some in (windows, windows, windows[:1]):
            gradients, allocations = [torch.ones_like(values) for _ in some], Allocations()
            with FlopCounterMode(display=False) as products, allocations:
                self._engine.step(some, gradients, self._options)
            taken.append(allocations.peak_bytes)
        _, both, one = taken
        return windows[0].state, one, both - one, products.get_total_flops()
