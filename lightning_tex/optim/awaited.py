"""A parameter whose values are still on their way from its owners: whoever reads them waits for them first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_GETTERS = ("shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_leaf", "is_cuda", "is_meta", "_version")
# Operations that read no value. `is_complex` is not among them: by it torch.distributed tells of a tensor it will send.
_VALUE_FREE = {
    *(getattr(Tensor, name).__get__ for name in _GETTERS),
    *(getattr(Tensor.grad, name) for name in ("__get__", "__set__", "__delete__")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.element_size),
    Tensor.is_floating_point,
}


class AwaitedParameter(nn.Parameter):
    """What an ``nn.Parameter`` is for as long as its values are under way; the same object, before and after.

    An operation of torch on it waits, wherever it is called, and then takes the plain parameter. What does not read
    values, such as its shape or ``.grad``, does not wait.

    Attributes:
        arrive: waits.
    """

    arrive: Callable[[], None]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _VALUE_FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        for one in tree_leaves((args, kwargs)):
            arrive(one)
        return func(*args, **kwargs)


def arrive(value: object) -> None:
    """Wait for a parameter's values, if they are under way."""
    if type(value) is AwaitedParameter:
        value.arrive()


def can_be_awaited(parameter: nn.Parameter) -> bool:
    """Whether it is a plain parameter, not of a class of its own."""
    return type(parameter) is nn.Parameter


def make_awaited(parameter: nn.Parameter, arrive: Callable[[], None]) -> None:
    """Its values are under way; ``arrive`` waits for them and calls :func:`make_plain`."""
    parameter.__class__ = AwaitedParameter
    parameter.arrive = arrive  # type: ignore[attr-defined]


def make_plain(parameter: nn.Parameter) -> None:
    """Its values are there."""
    if type(parameter) is AwaitedParameter:
        del parameter.arrive
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]
