"""Where a loop gets its loaders from: they begin and end together on all ranks, and stay the user's own objects."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

from lightning import Trainer
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from lightning_tex.parallel.topology import Axis
from lightning_tex.strategy.batches import agreed_loader, evaluation_loader, require_equal_lengths

# Makes of a loader, and the number of batches that is asked of it, one that goes together with those of other ranks.
_Together = Callable[[Any, float, Axis], Any]


def take_over_sources(trainer: Trainer, host: Callable[[], Axis]) -> None:
    """Let the Trainer's loops get loaders that iterate together; what they show stays as the user made it.

    Args:
        trainer: the Trainer, of several ranks.
        host: gives all ranks over the host's network, from when processes are set up on.
    """
    loops: list[Any] = [
        trainer.fit_loop,
        trainer.fit_loop.epoch_loop.val_loop,
        trainer.validate_loop,
        trainer.test_loop,
        trainer.predict_loop,
    ]
    for loop in loops:
        source = loop._data_source
        if not isinstance(source, TogetherSource):
            loop._data_source = TogetherSource(source, host, training=loop is trainer.fit_loop)


class TogetherSource(_DataLoaderSource):
    """A loop's source whose combined loader agrees with those of other ranks when it is iterated.

    Args:
        source: in whose place it stands.
        host: see :func:`take_over_sources`.
        training: whether epochs end with the first rank that has no more; else each rank must have something.
    """

    def __init__(self, source: _DataLoaderSource, host: Callable[[], Axis], training: bool) -> None:
        super().__init__(source.instance, source.name)
        self._host = host
        self._together: _Together = agreed_loader if training else evaluation_loader
        self._mode: Literal["max_size_cycle", "sequential"] = "max_size_cycle" if training else "sequential"

    def users_own(self) -> Any:
        """The user's loaders as they are."""
        return super().dataloader()

    def dataloader(self) -> Any:
        """The user's loaders, combined as Lightning would."""
        loaders = self.users_own()
        combined = copy.copy(loaders) if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, self._mode)
        kind = type(combined)
        agreeing: Any = combined  # of a class that may be the user's
        agreeing.__class__ = type(kind.__name__, (_AgreeingLoader, kind), {})
        agreeing.agree_by(self._together, self._host)
        return agreeing


class _AgreeingLoader(CombinedLoader):
    """What a combined loader iterates over agrees with other ranks; ``flattened`` and ``iterables`` are the user's."""

    _agreed: tuple[list[Any], Any, list[Any]] | None

    def agree_by(self, together: _Together, host: Callable[[], Axis]) -> None:
        self._loader_together, self._host = together, host
        self._agreed = None

    def __iter__(self) -> Any:
        users = self._flattened
        self._flattened = self._agreed_loaders()
        try:
            return super().__iter__()
        finally:
            self._flattened = users

    def __len__(self) -> int:
        """Batches of an evaluation; not known where a loader's are not, which may have fewer than it is limited to."""
        # Where it is not known Lightning reads ahead, and so knows which batch is a rank's last.
        if self._mode == "sequential" and any(sized_len(loader) is None for loader in self._flattened):
            raise TypeError("a loader has no length")
        return super().__len__()

    def _agreed_loaders(self) -> list[Any]:
        """Asked of the other ranks once for the same loaders; collective."""
        if self._agreed is None or self._agreed[0] is not self._flattened or self._agreed[1] != self._limits:
            limits: Any = self._limits or [float("inf")] * len(self._flattened)
            host = self._host()
            if self._mode == "sequential" and len(self._flattened) > 1:
                require_equal_lengths(self._flattened[:-1], limits[:-1], host)
            agreed = [
                self._loader_together(loader, limit, host)
                for loader, limit in zip(self._flattened, limits, strict=True)
            ]
            self._agreed = self._flattened, self._limits, agreed
        return self._agreed[2]
