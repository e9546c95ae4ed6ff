"""Which ranks work together on what: two meshes over the same ranks (paper, Eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lightning_tex.parallel.byte_meter import ByteMeter
from lightning_tex.parallel.groups import ProcessGroups, groups_of_world
from lightning_tex.parallel.layout import AXES, Communication, Layout


@dataclass(frozen=True)
class Axis:
    """One mesh axis as one rank sees it.

    Args:
        name: ``tensor``, ``data``, ``expert_tensor``, ``expert``, ``expert_data`` or ``world``.
        size: number of ranks along the axis.
        rank: this rank's coordinate on the axis, ``0 <= rank < size``.
        ranks: the global ranks of this rank's group, in axis order.
        group: their process group; ``None`` only where no processes exist.
        meter: counts what is sent over the axis; all axes of a topology share one.
    """

    name: str
    size: int = 1
    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = None
    meter: ByteMeter | None = field(default=None, compare=False, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Axis:
        # A process group can be shared but not copied, and modules that hold an axis get deep-copied (EMA).
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled modules come back as one-process modules: a process group cannot leave its process.
        return Axis, (self.name,)


@dataclass(frozen=True)
class Topology:
    """The two meshes over the same ranks, as one rank sees them.

    ``mesh`` is (data, tensor), for everything but experts; ``expert_mesh`` is (expert_data, expert, expert_tensor).
    Both are ``None`` in a single process that has no process group. ``host`` is the world over the host's network: what
    is small and lies on the CPU goes there, so that no rank waits for its device; ``expert_host`` likewise, of expert.
    """

    layout: Layout
    tensor: Axis
    data: Axis
    expert_tensor: Axis
    expert: Axis
    expert_data: Axis
    world: Axis
    host: Axis
    expert_host: Axis
    mesh: DeviceMesh | None = None
    expert_mesh: DeviceMesh | None = None
    communication: Communication = field(default_factory=Communication)

    def __deepcopy__(self, memo: dict[int, Any]) -> Topology:
        return self

    def axis(self, name: str) -> Axis:
        """The axis of that name."""
        axis = getattr(self, name)
        assert isinstance(axis, Axis)
        return axis

    @classmethod
    def single(cls) -> Topology:
        """The topology of one process without process groups: every axis has size 1."""
        return cls.without_groups(Layout(1))

    @classmethod
    def without_groups(cls, layout: Layout) -> Topology:
        """A layout's first rank as a topology that has sizes and no processes: for what is only reckoned with."""
        axes = {name: Axis(name, layout.axis_size(name)) for name in (*AXES, "world")}
        return cls(layout, **axes, host=axes["world"], expert_host=axes["expert"])  # type: ignore[arg-type]

    @classmethod
    def build(
        cls,
        layout: Layout,
        device_type: str,
        mesh: DeviceMesh | None = None,
        communication: Communication | None = None,
        timeout: timedelta | None = None,
    ) -> Topology:
        """Make the process groups of a layout. Collective: every rank of the world calls it.

        Args:
            layout: the checked sizes.
            device_type: ``"cpu"`` or ``"cuda"``.
            mesh: the (data, tensor) mesh if it exists already; the expert mesh is built beside it.
            communication: what is done to communicate less; ``None``: the defaults.
            timeout: of collectives; ``None``: torch's.
        """
        groups = groups_of_world(timeout)
        mesh = mesh or _mesh(layout, device_type, ("data", "tensor"), groups)
        for name in ("data", "tensor"):
            groups.knows(layout.groups(name), mesh.get_group(name))
        expert_mesh = _mesh(layout, device_type, ("expert_data", "expert", "expert_tensor"), groups)
        rank = dist.get_rank()
        meter = ByteMeter()

        def axis(name: str) -> Axis:
            of = mesh if name in ("tensor", "data") else expert_mesh
            group = of.get_group(name)
            members = tuple(dist.get_process_group_ranks(group))
            return Axis(name, len(members), members.index(rank), members, group, meter)

        world = Axis("world", layout.world, rank, tuple(range(layout.world)), dist.group.WORLD, meter)
        expert = axis("expert")
        on_host = groups.on_host(layout.groups("expert"), expert.group, "expert")
        return cls(
            layout,
            tensor=axis("tensor"),
            data=axis("data"),
            expert_tensor=axis("expert_tensor"),
            expert=expert,
            expert_data=axis("expert_data"),
            world=world,
            host=replace(world, group=groups.host(), meter=None),
            expert_host=replace(expert, group=on_host),
            mesh=mesh,
            expert_mesh=expert_mesh,
            communication=communication or Communication(),
        )


class _LocalMesh(DeviceMesh):
    """A mesh that modules hold: shared where they are copied, left behind where they are pickled."""

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceMesh:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def build_mesh(layout: Layout, device_type: str, timeout: timedelta | None = None) -> DeviceMesh:
    """The (data, tensor) mesh of a layout. Collective over the world.

    Args:
        layout: the checked sizes.
        device_type: ``"cpu"`` or ``"cuda"``.
        timeout: of collectives; ``None``: torch's.
    """
    return _mesh(layout, device_type, ("data", "tensor"), groups_of_world(timeout))


def _mesh(layout: Layout, device_type: str, names: tuple[str, ...], groups: ProcessGroups) -> DeviceMesh:
    ranks = torch.arange(layout.world).view([layout.axis_size(name) for name in names])
    of_axes = [groups.of(layout.groups(name), name, by_itself=name == "expert") for name in names]
    mesh = DeviceMesh.from_group(of_axes, device_type, mesh=ranks, mesh_dim_names=names)
    mesh.__class__ = _LocalMesh
    return mesh
