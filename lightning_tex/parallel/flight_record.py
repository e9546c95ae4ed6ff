"""Which collective this rank is in, and which came before: written as they begin, read when something has gone wrong.

Writing costs about a microsecond and no synchronisation of the device: a tuple in a ring, a few attributes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_tex.parallel.topology import Axis

# Collectives whose tensor has one shape on all ranks of the axis; what an all-to-all sends may differ.
ALIKE = frozenset({"all_reduce", "all_gather", "reduce_scatter", "broadcast"})


class Call(NamedTuple):
    """A collective that this rank has begun.

    Args:
        number: of this rank's collectives, from 1; ranks that run the same program agree in it.
        operation: such as ``all_reduce``.
        axis: the axis; its ``ranks`` are empty where it stands for all ranks.
        shape, dtype: of the tensor this rank gives, ``None`` for objects and barriers.
        layer: the layer that was entered last.
        step: optimizer steps done.
    """

    number: int
    operation: str
    axis: Axis
    shape: torch.Size | None
    dtype: torch.dtype | None
    layer: str
    step: int


class FlightRecord:
    """One rank's collectives of one thread, in order.

    Args:
        name: of the thread's work, the same on all ranks.
        length: collectives that are remembered.
    """

    def __init__(self, name: str, length: int = 128) -> None:
        self.name = name
        self.step = 0
        self.layer = ""
        self.number = 0
        self.waits_in: tuple[Any, ...] | None = None
        self.since = monotonic()
        self._calls: deque[tuple[Any, ...]] = deque(maxlen=length)

    def begin(self, operation: str, axis: Axis, x: Tensor | None = None) -> tuple[Any, ...]:
        """A collective begins; gives the entry that :meth:`wait` and nothing else asks for."""
        self.number = number = self.number + 1
        tensor = (None, None) if x is None else (x.shape, x.dtype)
        entry = (number, operation, axis, *tensor, self.layer, self.step)
        self._calls.append(entry)
        return entry

    def wait(self, entry: tuple[Any, ...]) -> None:
        """This thread waits for it from now on."""
        self.since = monotonic()
        self.waits_in = entry

    def enter(self, operation: str, axis: Axis, x: Tensor | None = None) -> None:
        """A collective begins, and this thread waits for it."""
        entry = self.begin(operation, axis, x)
        self.since = monotonic()
        self.waits_in = entry

    def leave(self) -> None:
        """What this thread waited for has returned."""
        self.waits_in = None
        self.since = monotonic()

    @contextmanager
    def inside(self, operation: str, axis: Axis, x: Tensor | None = None) -> Iterator[None]:
        """As :meth:`enter` and :meth:`leave`. After an error it still waits: that is where the error came from."""
        self.enter(operation, axis, x)
        yield
        self.leave()

    @property
    def last_calls(self) -> Sequence[Call]:
        """The collectives that are remembered, the oldest first."""
        for _ in range(8):  # the thread that is being watched may append meanwhile
            try:
                return [Call(*entry) for entry in tuple(self._calls)]
            except RuntimeError:
                continue
        return []

    @property
    def waiting_for(self) -> Call | None:
        """The collective this thread waits for."""
        entry = self.waits_in
        return None if entry is None else Call(*entry)


# Of the thread that trains, and of the thread that saves beside it.
TRAINING = FlightRecord("training")
SAVING = FlightRecord("saving")
RECORDS = (TRAINING, SAVING)
EVERY_RANK = Axis("world", ranks=())


class _Entered:
    """A forward pre-hook that writes the layer's name down. A class, because modules are copied and pickled."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *_: Any) -> None:
        TRAINING.layer = self.name


def name_layers(layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Let modules say when they are entered, under these names. Idempotent."""
    for name, layer in layers:
        for key, hook in list(layer._forward_pre_hooks.items()):
            if isinstance(hook, _Entered):
                del layer._forward_pre_hooks[key]
        layer.register_forward_pre_hook(_Entered(name))
