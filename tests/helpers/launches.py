"""What a GPU is asked to do, counted where there is none: operations of torch that are no views."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch.utils._python_dispatch import TorchDispatchMode

from lightning_tex.parallel.compiled import Leaf

# They make or describe memory, or answer questions about dtypes.
_NOTHING = {
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "detach",
    "promote_types",
    "lift_fresh",
    "_unsafe_view",
}


class Launches(TorchDispatchMode):
    """Counts the operations inside, by name: each is a launch or more, a view is none.

    Args:
        leaves: a leaf function counts as one, as compiled it is one or two kernels; else as its operations.
    """

    def __init__(self, leaves: bool) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._leaves, self._in_leaf = leaves, False

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not (self._in_leaf or func.is_view or name in _NOTHING):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    def _call(self, leaf: Leaf[Any, Any], args: Any, kwargs: Any) -> Any:
        if not self._leaves or self._in_leaf:
            return leaf.eager(*args, **kwargs)
        self.counts[f"leaf {leaf.eager.__name__}"] += 1
        self._in_leaf = True
        try:
            return leaf.eager(*args, **kwargs)
        finally:
            self._in_leaf = False


@contextmanager
def launches(leaves: bool = True) -> Iterator[Launches]:
    """Inside, counts in what it gives."""
    counting = Launches(leaves)
    with patch.object(Leaf, "__call__", lambda leaf, *args, **kwargs: counting._call(leaf, args, kwargs)), counting:
        yield counting
