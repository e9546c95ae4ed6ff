"""What is kept of a shard between steps, and in which form: the seam behind ``optimizer_state_format``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_tex.optim.walk import Walk

# The values of more precision behind a 16-bit parameter, among the states of the user's optimizer.
MASTER = "master"
LOW_PRECISION = (torch.bfloat16, torch.float16)


class Window(NamedTuple):
    """What the user's optimizer steps: some consecutive elements, and its state for them."""

    tile: nn.Parameter
    state: dict[str, Any]


class SavedState(NamedTuple):
    """A state that is a tensor: its dtype, and how to get it. [n], one value per element, or of the ``shape``"""

    dtype: torch.dtype
    read: Callable[[], Tensor]
    shape: tuple[int, ...] | None = None


class SavedSize(NamedTuple):
    """What a checkpoint has of a shard's states: bytes for each element, and for each parameter besides."""

    per_element: int
    per_parameter: int

    @classmethod
    def of(cls, states: dict[str, Any]) -> SavedSize:
        """Of what :meth:`StateFormat.saved_states` gives."""
        each = [value.dtype.itemsize for value in states.values() if isinstance(value, SavedState)]
        numbers = [torch.as_tensor(value).nbytes for value in states.values() if not isinstance(value, SavedState)]
        return cls(sum(each), sum(numbers))


class KeptStates(ABC):
    """The states of one shard, window by window, as checkpoints see them.

    Attributes:
        has_master: whether values of more precision than the parameters' are kept.
    """

    has_master: bool

    @abstractmethod
    def clear(self) -> None:
        """Drop the optimizer's states."""

    @abstractmethod
    def memory(self) -> Iterator[tuple[Literal["master", "moments"], Tensor]]:
        """Every tensor that is kept between steps, with what it is for."""

    @abstractmethod
    def saved_states(self, i: int) -> dict[str, Any]:
        """States of window ``i``: :class:`SavedState` or, where there is one for all elements, a number."""

    @abstractmethod
    def memory_for(self, i: int, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Memory to read the values of a saved state into; :meth:`filled` follows.

        Args:
            i, key: which.
            dtype, shape: as saved, of the whole parameter.
        """

    @abstractmethod
    def filled(self, i: int, key: str, values: Tensor) -> None:
        """What :meth:`memory_for` gave has the values now."""

    @abstractmethod
    def set_number(self, i: int, key: str, value: Any) -> None:
        """Set a state that all elements of window ``i`` share."""


class StateFormat(KeptStates):
    """The values and states of one shard, in windows that cut through parameters.

    Args:
        own: the shard's parameters, in the dtype the model computes with. [n]
        tile_size: elements of a window, but for the last one.

    Attributes:
        in_place: windows are what is kept.
        saved_size: of its states once it has been stepped, as a trial showed.
    """

    in_place = False
    saved_size = SavedSize(0, 0)

    def __init__(self, own: Tensor, tile_size: int) -> None:
        self.own, self.tile_size = own, tile_size
        self.spans = [slice(start, min(start + tile_size, len(own))) for start in range(0, len(own), tile_size)]

    @abstractmethod
    def window(self, i: int, walk: Walk) -> AbstractContextManager[Window]:
        """Window ``i``, to be stepped inside; what the step leaves is kept, and the parameters follow.

        Args:
            i: which.
            walk: what it is a part of. Where that is skipped, what is kept stays so to the bit.
        """

    @abstractmethod
    def adopt_parameters(self) -> None:
        """Take the parameters for the truth: somebody else wrote them."""


class PlainStates(StateFormat):
    """Everything in the precision it is updated in: persistent windows, stepped in place.

    Args:
        own, tile_size: see :class:`StateFormat`.
        master: keep an fp32 copy of the parameters and update that.
    """

    in_place = True

    def __init__(self, own: Tensor, tile_size: int, master: bool) -> None:
        super().__init__(own, tile_size)
        self.has_master = master
        self.values = own.float() if master else own
        self.windows = [
            Window(nn.Parameter(tile, requires_grad=False), {}) for tile in self.values.split(tile_size) if len(tile)
        ]

    @contextmanager
    def window(self, i: int, walk: Walk) -> Iterator[Window]:
        yield self.windows[i]
        if self.has_master:
            walk.copy(self.windows[i].tile, self.own[self.spans[i]])

    def adopt_parameters(self) -> None:
        if self.has_master:
            self.values.copy_(self.own)

    def clear(self) -> None:
        for window in self.windows:
            window.state.clear()

    def memory(self) -> Iterator[tuple[Literal["master", "moments"], Tensor]]:
        if self.has_master:
            yield "master", self.values
        for window in self.windows:
            yield from (("moments", value) for value in window.state.values() if isinstance(value, Tensor))

    def saved_states(self, i: int) -> dict[str, Any]:
        window = self.windows[i]
        states = {key: _saved_state(value, window.tile) for key, value in window.state.items() if value is not None}
        return {**states, MASTER: _saved_state(window.tile.detach(), window.tile)} if self.has_master else states

    def memory_for(self, i: int, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        window = self.windows[i]
        if key == MASTER:
            return window.tile.detach()
        if key not in window.state:
            own = window.tile.dtype if dtype.is_floating_point else dtype
            window.state[key] = torch.zeros_like(window.tile, dtype=own)
        state: Tensor = window.state[key]
        return state

    def filled(self, i: int, key: str, values: Tensor) -> None:
        """Nothing: the values were read in place."""

    def set_number(self, i: int, key: str, value: Any) -> None:
        self.windows[i].state[key] = value


def per_element(value: Any, tile: Tensor) -> bool:
    """Whether a state has one value per element of its window."""
    return isinstance(value, Tensor) and value.shape == tile.shape


def _saved_state(value: Any, tile: Tensor) -> Any:
    return SavedState(value.dtype, lambda: value) if per_element(value, tile) else value
