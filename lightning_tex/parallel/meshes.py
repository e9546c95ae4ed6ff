"""The process groups of a world, as meshes: made once, and taken again by every later Trainer of the same processes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout

# By what they were made of, the world first; all of one world.
_meshes: dict[tuple[Any, ...], DeviceMesh] = {}


def mesh_of_world(device_type: str, sizes: Mapping[str, int], timeout: timedelta | None) -> DeviceMesh:
    """A mesh over all ranks. Collective over the world.

    Process groups last as long as the world does, and each has threads that wake a hundred times a second (gloo), or a
    communicator with buffers on the GPU (NCCL).

    Args:
        device_type: ``"cpu"`` or ``"cuda"``.
        sizes: of its dims, by name; ranks are neighbours in the last one.
        timeout: of collectives; ``None``: torch's.
    """
    world = dist.group.WORLD
    made_of = (world, device_type, *sizes.items(), timeout)
    if made_of not in _meshes:
        if any(earlier[0] is not world for earlier in _meshes):
            _meshes.clear()
        ranks = torch.arange(prod(sizes.values())).view(*sizes.values())
        mesh = DeviceMesh(device_type, ranks, mesh_dim_names=tuple(sizes))
        if timeout is not None and dist.get_backend() != "fake":
            for group in mesh.get_all_groups():  # which no argument of a mesh reaches
                _set_pg_timeout(timeout, group)
        _meshes[made_of] = mesh
    return _meshes[made_of]
