"""The memory behind tensors: bytes by storage, each once, and a watch over what operations allocate and free."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable
from itertools import chain
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Allocation = TypeVar("Allocation")


def storage_key(tensor: Tensor) -> int:
    """What tensors that share memory have in common, as long as one of them lives."""
    return tensor.untyped_storage()._cdata


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each once."""
    return sum({storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def tensors_in(*values: Iterable[Any]) -> list[Tensor]:
    """The tensors among an operation's arguments or results, those in lists included."""
    found: list[Tensor] = []
    for value in chain(*values):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


class AllocationWatch(TorchDispatchMode, ABC, Generic[Allocation]):
    """Sees every storage that an operation makes, until nothing holds it any more.

    Attributes:
        clock: operations up to now.
        live: what :meth:`allocated` made of each storage that lives, by :func:`storage_key`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = 0
        self.live: dict[int, Allocation] = {}

    @abstractmethod
    def allocated(self, size: int) -> Allocation:
        """An operation made a storage of ``size`` bytes; returns what is to be known of it."""

    @abstractmethod
    def freed(self, allocation: Allocation) -> None:
        """Nothing holds the storage any more."""

    def counts(self, tensor: Tensor) -> bool:
        """Whether a result's storage is memory."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = {storage_key(tensor) for tensor in tensors_in(args, kwargs.values())}
        result = func(*args, **kwargs)
        self.clock += 1
        for tensor in tensors_in([result]):
            key = storage_key(tensor)
            if key not in before and key not in self.live and self.counts(tensor):
                self._watch(key, tensor.untyped_storage())
        return result

    def _watch(self, key: int, storage: torch.UntypedStorage) -> None:
        allocation = self.live[key] = self.allocated(storage.nbytes())
        # torch keeps a storage's Python object as long as any tensor has the storage.
        weakref.finalize(storage, self._release, key, allocation).atexit = False

    def _release(self, key: int, allocation: Allocation) -> None:
        if self.live.get(key) is allocation:
            del self.live[key]
        self.freed(allocation)
