"""What a GPU is asked to do, counted where there is none: operations of torch that are no views."""

from __future__ import annotations

from collections import Counter
from typing import Any, Self
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_tex.parallel.compiled import Leaf

# They make or describe memory.
_NO_KERNEL = {
    "empty",
    "empty_like",
    "new_empty",
    "new_empty_strided",
    "empty_strided",
    "detach",
    "lift_fresh",
    "split",
    "split_with_sizes",
    "unbind",
    "_unsafe_view",
}
# torch's kernels over lists of tensors take so many chunks of so many elements in one launch.
_CHUNK, _CHUNKS = 1 << 16, 320


class Launches(TorchDispatchMode):
    """Counts the operations inside, but for views and allocations.

    Args:
        leaves: a leaf function counts as one, as compiled it is one kernel to five; else as its operations.

    Attributes:
        names: how often each was called.
        kernels: launches of them where operations over lists take several, as large lists do.
    """

    def __init__(self, leaves: bool = True) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.kernels = 0
        self._leaves, self._in_leaf = leaves, False
        self._patch = patch.object(Leaf, "__call__", lambda leaf, *args, **kwargs: self._call(leaf, args, kwargs))

    @property
    def count(self) -> int:
        """Operations."""
        return self.names.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        over_lists = name.startswith(("_foreach_", "_fused_"))
        made = over_lists or any(isinstance(made, Tensor) for made in tree_leaves(result))
        if made and not (self._in_leaf or func.is_view or name in _NO_KERNEL):
            self.names[name] += 1
            self.kernels += _kernels(args) if over_lists else 1
        return result

    def _call(self, leaf: Leaf[Any, Any], args: Any, kwargs: Any) -> Any:
        if not self._leaves or self._in_leaf:
            return leaf.eager(*args, **kwargs)
        self.names[f"leaf {leaf.eager.__name__}"] += 1
        self.kernels += 1
        self._in_leaf = True
        try:
            return leaf.eager(*args, **kwargs)
        finally:
            self._in_leaf = False

    def __enter__(self) -> Self:
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._patch.stop()


def _kernels(args: Any) -> int:
    listed = [tensor for tensor in tree_leaves(args[0]) if isinstance(tensor, Tensor)]
    return -(-sum(-(-tensor.numel() // _CHUNK) for tensor in listed) // _CHUNKS)
