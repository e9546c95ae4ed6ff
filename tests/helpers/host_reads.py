"""What would make the host wait for a GPU, counted where there is none: values of tensors that the host reads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_TORCH = str(Path(torch.__file__).parent)


class HostRead(NamedTuple):
    """One wait.

    Args:
        what: the operation or method that reads.
        place: file and line of the innermost call outside torch, as ``optim/shard.py:12``.
    """

    what: str
    place: str


@contextmanager
def host_reads(watched: Callable[[Tensor], bool] = lambda tensor: True) -> Iterator[list[HostRead]]:
    """Inside, notes every read of a tensor's values by the host, in a list that grows.

    Seen are: ``item``, ``int``, ``float``, ``bool`` and what operations read themselves (``_local_scalar_dense``);
    ``tolist``, ``numpy``, ``cpu``; operations whose result has a size that depends on values (``nonzero``, ``unique``,
    ``masked_select``, ``bincount``, an index that is a mask, ``repeat_interleave`` without ``output_size``); ``equal``;
    and ``torch.tensor(.., device=..)``, which copies memory that is not pinned and waits for that.

    Backwards are seen, which run in the caller's thread on CPU. Not seen are ``.to("cpu")`` and a ``copy_`` between
    devices, which one device cannot tell: ``torch.cuda.set_sync_debug_mode`` does on a GPU.

    Args:
        watched: tensors for which it matters; by default all, so that host tensors (a vote's) count as well.
    """
    reads: list[HostRead] = []

    def note(what: str, tensor: Any) -> None:
        if not isinstance(tensor, Tensor) or watched(tensor):
            reads.append(HostRead(what, _place()))

    with ExitStack() as stack:
        for name in ("tolist", "numpy", "cpu", "__array__"):
            stack.enter_context(patch.object(Tensor, name, _noting(getattr(Tensor, name), name, note)))
        stack.enter_context(patch.object(torch, "tensor", _noting_uploads(torch.tensor, note)))
        stack.enter_context(_Operations(note))
        yield reads


Note = Callable[[str, Any], None]


def _noting(method: Callable[..., Any], name: str, note: Note) -> Callable[..., Any]:
    def noted(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        note(name, self)
        return method(self, *args, **kwargs)

    return noted


def _noting_uploads(function: Callable[..., Any], note: Note) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        made = function(*args, **kwargs)
        if kwargs.get("device") is not None:
            note("torch.tensor(device=)", made)
        return made

    return noted


_READING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.unique_dim.default,
    torch.ops.aten.unique_consecutive.default,
    torch.ops.aten.bincount.default,
    torch.ops.aten.equal.default,
}
_INDEXING = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}


class _Operations(TorchDispatchMode):
    def __init__(self, note: Note) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READING or _has_mask(func, args) or _repeats_unknown_often(func, args, kwargs):
            self._note(str(func).removesuffix(".default"), args[0])
        return func(*args, **kwargs)


def _has_mask(func: Any, args: Any) -> bool:
    return func in _INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _repeats_unknown_often(func: Any, args: Any, kwargs: Any) -> bool:
    size = kwargs.get("output_size", args[1] if len(args) > 1 else None)
    return func is torch.ops.aten.repeat_interleave.Tensor and size is None


def _place() -> str:
    frame = sys._getframe(1)
    here = (__file__, _TORCH)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(here):
        frame = frame.f_back
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno}"
