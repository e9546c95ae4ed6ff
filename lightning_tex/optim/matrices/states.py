"""What the owner of matrices keeps of them between steps: fp32 masters of 16-bit ones, and the optimizer's states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_tex.optim.formats import MASTER, KeptStates, SavedState
from lightning_tex.optim.matrices.units import Unit


class MatrixStates(KeptStates):
    """States of whole matrices, in the form and precision that the user's optimizer gives them.

    Args:
        units: those that this rank owns; a window is one of them.
        masters: their fp32 values, where parameters have 16 bits; else ``None``.
        like: a tensor of the dtype that matrices are updated in, on their device.

    Attributes:
        read: values of more precision than the parameters' that a checkpoint has, by window, until they are taken up.
    """

    def __init__(self, units: Sequence[Unit], masters: list[Tensor] | None, like: Tensor) -> None:
        self.units, self.masters, self._like = units, masters, like
        self.has_master = masters is not None
        self.states: list[dict[str, Any]] = [{} for _ in units]
        self.read: dict[int, Tensor] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Matrices are updated in it."""
        return self._like.dtype

    def clear(self) -> None:
        for state in self.states:
            state.clear()

    def memory(self) -> Iterator[tuple[Literal["master", "moments"], Tensor]]:
        for master in self.masters or ():
            yield "master", master
        for state in self.states:
            yield from (("moments", value) for value in state.values() if isinstance(value, Tensor))

    def saved_states(self, i: int) -> dict[str, Any]:
        states = {key: _saved(value) for key, value in self.states[i].items() if value is not None}
        return states if self.masters is None else {**states, MASTER: _saved(self.masters[i])}

    def memory_for(self, i: int, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        if key == MASTER and self.masters is not None:
            return self.masters[i]
        own = self._like.dtype if dtype.is_floating_point else dtype
        memory = torch.zeros(self.units[i].of_one(shape), dtype=own, device=self._like.device)
        if key == MASTER:
            self.read[i] = memory
        else:
            self.states[i][key] = memory
        return memory

    def filled(self, i: int, key: str, values: Tensor) -> None:
        """Nothing: the values were read in place."""

    def set_number(self, i: int, key: str, value: Any) -> None:
        self.states[i][key] = value


def _saved(value: Any) -> Any:
    whole = isinstance(value, Tensor) and value.dim() > 0
    return SavedState(value.dtype, lambda: value, tuple(value.shape)) if whole else value
