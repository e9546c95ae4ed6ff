"""A layout's first rank in a world that does not exist, beside the world that this process may belong to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._C._distributed_c10d import FakeProcessGroup, ProcessGroup
from torch.distributed.distributed_c10d import _world
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_tex.parallel.errors import UserRuntimeError
from lightning_tex.parallel.layout import AXES, Communication, Layout
from lightning_tex.parallel.topology import Axis, Topology


@contextmanager
def pretended_topology(layout: Layout, communication: Communication) -> Iterator[Topology]:
    """The topology of the first rank, whose collectives move nothing, for as long as one is inside.

    Collectives over any other process group are refused inside: that world's ranks do not take part.

    Args:
        layout, communication: of the topology.
    """
    groups = {size: _fake_group(size) for size in {layout.axis_size(name) for name in (*AXES, "world")}}
    for size, group in groups.items():
        # torch looks up in its register what rank 0 of a broadcast is called; where it may be, is not looked at.
        _world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    axes = {
        name: Axis(name, size, 0, tuple(range(size)), groups[size])
        for name in (*AXES, "world")
        for size in (layout.axis_size(name),)
    }
    try:
        with _NoOtherWorld():
            hosts = {"host": axes["world"], "expert_host": axes["expert"]}
            yield Topology(layout, **axes, **hosts, communication=communication)  # type: ignore[arg-type]
    finally:
        for group in groups.values():
            del _world.pg_group_ranks[group]


def _fake_group(size: int) -> ProcessGroup:
    group, kind = ProcessGroup(FakeStore(), 0, size), ProcessGroup.BackendType.CUSTOM
    group._set_default_backend(kind)
    group._register_backend(torch.device("cpu"), kind, FakeProcessGroup._create_internal(0, size))
    return group


class _NoOtherWorld(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and not any(map(_is_fake, args)):
            raise UserRuntimeError(
                f"{func} communicates over a process group of its own; legal in a traced step: the collectives of TEX "
                "layers, trainer.strategy and self.all_gather"
            )
        return func(*args, **(kwargs or {}))


def _is_fake(argument: Any) -> bool:
    if not isinstance(argument, torch.ScriptObject):
        return False
    try:
        backend = ProcessGroup.unbox(argument)._get_backend(torch.device("cpu"))
    except (RuntimeError, TypeError):  # no process group, or one of GPUs
        return False
    return isinstance(backend, FakeProcessGroup)
