"""Leaf functions: element-wise and index work, written once in torch and compiled into few kernels where that pays.

A leaf takes and gives tensors and numbers and calls no collective. Run eagerly it is its own reference. Compiled, by
``torch.compile``, a chain of element-wise work and gathers becomes one pass over memory. What is compiled is decided by
one setting of the process, since a backward runs in threads of autograd's own.

Only the first dim of a positional tensor, its rows, may change between calls without compiling anew (of sequences, the
first two). With all dims free, a gather or a sum of gathered rows takes two to three times as long on an H200; with the
width known it runs at the memory's speed. A sum over few gathered rows is best written out, an addition each: as a
reduction it takes four times as long.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Generic, Literal, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor, nn

from lightning_tex.parallel.errors import UserValueError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# Values of the strategy's option of this name.
Compile = Literal["auto", True, False]

# Widths, single rows and dtypes make further variants of a leaf; a handful of each is ordinary.
_VARIANTS = 64


class _Setting:
    mode: Compile = "auto"


def compile_leaves(mode: Compile) -> None:
    """Set for this process whether leaf functions are compiled.

    Args:
        mode: ``"auto"``: on CUDA, and eagerly after a warning where there is no compiler; ``True``: on every device, or
            fail; ``False``: nowhere.

    Raises:
        ValueError: any other value.
    """
    if mode not in get_args(Compile) or not isinstance(mode, (str, bool)):
        raise UserValueError(f"compile={mode!r}; legal: {', '.join(map(repr, get_args(Compile)))}")
    _Setting.mode = mode


class Leaf(Generic[Arguments, Result]):
    """A leaf function. ``eager`` is the plain one.

    Args:
        function: takes tensors whose number of rows (dim 0) changes as positional arguments, and others, such as
            weights, by keyword.
        free_dims: how many dims from the first on may change.
    """

    def __init__(self, function: Callable[Arguments, Result], free_dims: int = 1) -> None:
        functools.update_wrapper(self, function)
        self.eager = function
        self.free_dims = free_dims
        self._compiled: Callable[Arguments, Result] | None = None
        self._gave_up = False

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not self._compiles((*args, *kwargs.values())):
            return self.eager(*args, **kwargs)
        if self._compiled is None:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
            self._compiled = torch.compile(self.eager, fullgraph=True, dynamic=False)
        for arg in args:
            if isinstance(arg, Tensor):
                for dim in range(min(self.free_dims, arg.dim())):
                    torch._dynamo.maybe_mark_dynamic(arg, dim)
        if _Setting.mode is True:
            return self._compiled(*args, **kwargs)
        try:
            return self._compiled(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._gave_up = True
            name = getattr(self.eager, "__qualname__", repr(self.eager))
            warnings.warn(
                f"{name} runs uncompiled and slower, as torch.compile failed with {type(error).__name__}: "
                f"{str(error).strip().splitlines()[0] if str(error).strip() else ''}; compile=False says that this is "
                "meant, compile=True makes it an error",
                stacklevel=2,
            )
            return self.eager(*args, **kwargs)

    def _compiles(self, args: Iterable[Any]) -> bool:
        if _Setting.mode is False or self._gave_up or torch.compiler.is_compiling():
            return False
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        # Tensors of other types belong to a trace, which wants to see every operation; nothing is gained without rows.
        if not all(type(t) in (Tensor, nn.Parameter) and t.numel() for t in tensors):
            return False
        return _Setting.mode is True or any(t.is_cuda for t in tensors)


def leaf(function: Callable[Arguments, Result]) -> Leaf[Arguments, Result]:
    """Decorator: make a function a :class:`Leaf`."""
    return Leaf(function)


def sequence_leaf(function: Callable[Arguments, Result]) -> Leaf[Arguments, Result]:
    """Decorator: make a function of [B, S, ..] tensors, of any B and S, a :class:`Leaf`."""
    return Leaf(function, free_dims=2)
