"""Processes, their mesh and what Lightning communicates over it: the ground the strategy stands on."""

from __future__ import annotations

import atexit
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
)
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from lightning_utilities.core.rank_zero import rank_zero_only as utilities_rank_zero_only
from torch import Tensor
from torch.distributed import ReduceOp
from torch.distributed.device_mesh import DeviceMesh

from lightning_tex.parallel.allocator import use_growing_segments
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.flight_record import EVERY_RANK, TRAINING
from lightning_tex.parallel.groups import groups_of_world, reaches_cpu
from lightning_tex.parallel.initialization import has_values
from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.topology import Axis, build_mesh
from lightning_tex.resilience.agreement import Agreement, Comparison
from lightning_tex.resilience.nccl import record_flights
from lightning_tex.resilience.processes import stopped, through
from lightning_tex.resilience.rendezvous import meet
from lightning_tex.resilience.star import join_star
from lightning_tex.strategy import agreement
from lightning_tex.strategy.guarded_run import GuardedRun
from lightning_tex.strategy.launcher import RankLauncher
from lightning_tex.strategy.sent_objects import from_bytes, to_bytes

# By how much longer process groups wait than the watchdog, which says more than they do. NCCL's aborts the process.
_MARGIN = {"nccl": timedelta(seconds=60)}
_USUAL_MARGIN = timedelta(seconds=3)
# Ranks build models and read data at speeds of their own: a short timeout of collectives is not meant for that.
_SET_UP = timedelta(minutes=1)


def _destroy_groups() -> None:
    """At the end of a process whose last run no rank has failed in: their threads, left to themselves, can abort it."""
    if (through.is_set() or stopped.is_set()) and dist.is_initialized():
        dist.destroy_process_group()


def _unknown_ending(pid: int) -> str:
    """How a process has ended that another launcher than ours has started."""
    return ""


def _as_timedelta(timeout: timedelta | float | None) -> timedelta:
    """The strategy's option."""
    if timeout is None:
        return default_pg_timeout
    if not isinstance(timeout, timedelta):
        timeout = timedelta(seconds=timeout)
    if timeout <= timedelta(0):
        raise UserValueError(f"timeout={timeout.total_seconds():g} s; legal: a timedelta or seconds above 0, or None")
    return timeout


class MeshStrategy(ParallelStrategy):
    """A Lightning strategy over a (data, tensor) mesh: launching, process groups, and communication over data.

    Args:
        process_group_backend: ``None``: nccl on GPUs, gloo on CPUs.
        timeout: after which a collective that has not returned is a stall, which ends the run, as a timedelta or in
            seconds; ``None``: 30 minutes.
        arguments: of the strategy's constructor, by name, which all ranks must have alike.
        lightning_options: Lightning's own.
    """

    def __init__(
        self,
        process_group_backend: str | None,
        timeout: timedelta | float | None,
        arguments: Mapping[str, Any],
        **lightning_options: Any,
    ) -> None:
        super().__init__(**lightning_options)
        self._arguments = arguments
        self._advised: set[str] = set()
        self._process_group_backend = process_group_backend
        self.timeout = _as_timedelta(timeout)
        self._guarded_run = GuardedRun()
        self._mesh: DeviceMesh | None = None
        self.num_nodes = 1

    @abstractmethod
    def resolve_layout(self) -> Layout:
        """The layout as far as it is known: of the world once the Trainer is built, of the model once that is."""

    def __getstate__(self) -> dict[str, Any]:
        """Without what cannot leave the process: a copy finds processes of its own when it is set up."""
        return {**super().__getstate__(), "_mesh": None, "_guarded_run": GuardedRun()}

    # --- what the world is

    @property
    def is_distributed(self) -> bool:
        """Lightning asks this before it adds samplers and syncs logs."""
        return True

    @property
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Processes on this node."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    def device_mesh(self) -> DeviceMesh:
        """The (data, tensor) mesh; also ``LightningModule.device_mesh``."""
        if self._mesh is None:
            raise RuntimeError("The device mesh exists only after the Trainer has set up its processes")
        return self._mesh

    def set_world_ranks(self) -> None:
        """Called when the Trainer is built: the first moment the world is known, so a wrong layout ends here."""
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = utilities_rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]
        self.resolve_layout()

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        launcher = RankLauncher(self.cluster_environment, self.num_processes, self.num_nodes, self.run_frame)
        launcher.require_script(type(self).__name__)
        self._launcher = launcher

    def run_frame(self, trainer: Trainer) -> AbstractContextManager[None]:
        """The context of a whole run on this rank, from before set-up until the last error has passed."""
        return self._guarded_run.frame(trainer)

    def setup_environment(self) -> None:
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        if self.root_device.type == "cuda":
            use_growing_segments()
        super().setup_environment()
        if self.root_device.type not in ("cpu", "cuda"):
            raise MisconfigurationException(
                f"{type(self).__name__} does not run on {self.root_device.type!r}; legal accelerators: 'cpu', 'cuda'"
            )
        reset_seed()
        self.set_world_ranks()
        layout = self.resolve_layout()
        backend = self._process_group_backend or _get_default_process_group_backend_for_device(self.root_device)
        self._process_group_backend = backend
        assert self.cluster_environment is not None and self.lightning_module is not None
        if "nccl" in backend:
            record_flights(Path(self.lightning_module.trainer.default_root_dir))
        if not dist.is_initialized():
            self._init_process_group(self.cluster_environment, backend)
        launcher = self._launcher
        address, one_host = self.cluster_environment.main_address, self.num_nodes == 1
        self._guarded_run.connect(
            address,
            one_host,
            launcher.child_ending if isinstance(launcher, RankLauncher) else _unknown_ending,
            self.timeout,
            self._device_waits,
        )
        join_star(address, one_host, self.group_timeout)
        self._require_agreement(agreement.start(self._arguments, trainer, self.root_device.type))
        if self._mesh is None:
            self._mesh = build_mesh(layout, self.root_device.type, self.group_timeout)
        self.lightning_module._device_mesh = self._mesh

    def _init_process_group(self, environment: ClusterEnvironment, backend: str) -> None:
        store = meet(
            environment.main_address,
            environment.main_port,
            self.global_rank,
            self.world_size,
            self.timeout,
            {"process_group_backend": repr(backend), "the accelerator": self.root_device.type},
        )
        device_id = self.root_device if self.root_device.type == "cuda" else None
        _init_dist_connection(environment, backend, store=store, device_id=device_id, timeout=self.group_timeout)
        atexit.register(_destroy_groups)

    def _require_agreement(self, comparison: Comparison) -> None:
        """Compare over all ranks; raises on all of them, naming ranks and values. What is advised is told once."""
        patience = max(self.timeout, _SET_UP)
        advice = self._agreement(range(self.world_size), "world", patience).require(comparison)
        if advice and comparison.complaint not in self._advised:
            self._advised.add(comparison.complaint)
            rank_zero_warn(f"Ranks differ in what is usually alike: {advice}", category=UserWarning)

    def _agreement(self, ranks: Sequence[int], name: str, timeout: timedelta | None = None) -> Agreement:
        """What compares over some global ranks, this one among them, under a name of theirs."""
        store = dist.distributed_c10d._get_default_store()
        return Agreement(store, self.global_rank, ranks, timeout or self.timeout, name)

    @property
    def group_timeout(self) -> timedelta:
        """Of process groups: later than the watchdog's."""
        return self.timeout + _MARGIN.get(self._process_group_backend or "", _USUAL_MARGIN)

    def _device_waits(self) -> bool:
        """Whether the GPU has work left; asked only when nothing has happened for a long time."""
        return self.root_device.type == "cuda" and not torch.cuda.default_stream(self.root_device).query()

    def teardown(self) -> None:
        module = self._lightning_module
        if module is not None and not all(map(has_values, module.parameters())):
            # A trace, or refused before it had weights: there is nothing to move, and trying to would hide the reason.
            self._lightning_module = None
        super().teardown()
        self._lightning_module = module
        self._guarded_run.leave()

    # --- communication for Lightning

    def barrier(self, name: str | None = None) -> None:
        if dist.is_initialized():
            devices = [self.root_device.index] if dist.get_backend() == "nccl" else None
            with TRAINING.inside("barrier", EVERY_RANK):
                dist.barrier(device_ids=devices)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """``obj`` of a rank, on every rank; tensors in it that were on a GPU are on the own GPU."""
        if not dist.is_initialized():
            return obj
        sends = self.global_rank == src
        written = [to_bytes(obj) if sends else b""]
        with TRAINING.inside("broadcast of an object", EVERY_RANK):
            dist.broadcast_object_list(written, src, group=self._host_group())
        return obj if sends else from_bytes(written[0], self.root_device)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce over the data axis, in place but for means of integers, and for tensors on CPU in a run on GPUs.

        Ranks of one tensor group hold equal values, which count once.
        """
        if not isinstance(tensor, Tensor) or not dist.is_initialized():
            return tensor
        group = group or self._data_group()
        if not self._reaches(tensor, group):
            return self._reduce(tensor.to(self.root_device), group, reduce_op).to(tensor.device)
        return self._reduce(tensor, group, reduce_op)

    def _reduce(self, tensor: Tensor, group: Any, reduce_op: Any) -> Tensor:
        mean = reduce_op in ("mean", "avg")
        op = reduce_op if isinstance(reduce_op, ReduceOp) else getattr(ReduceOp, "SUM" if mean else reduce_op.upper())
        axis = Axis(
            "data" if group is self._data_group() else "world", ranks=tuple(dist.get_process_group_ranks(group))
        )
        if not mean:
            with TRAINING.inside("all_reduce", axis, tensor):
                dist.all_reduce(tensor, op=op, group=group)
            return tensor
        if not tensor.is_floating_point():  # a mean of counts, such as Lightning's batch sizes, is no whole number
            tensor = tensor.to(torch.get_default_dtype())
        with TRAINING.inside("all_reduce", axis, tensor):
            dist.all_reduce(tensor, op=op, group=group)
        return tensor.div_(dist.get_world_size(group))

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gather over the data axis: [..] -> [data, ..]."""
        group = group or self._data_group()
        there = tensor if self._reaches(tensor, group) else tensor.to(self.root_device)
        with TRAINING.inside("all_gather", EVERY_RANK):
            return super().all_gather(there, group, sync_grads).to(tensor.device)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        votes = self.reduce(torch.tensor(int(decision)), self._host_group() or dist.group.WORLD, "sum")
        return bool(votes == self.world_size) if all else bool(votes)

    def _data_group(self) -> Any:
        return self._mesh.get_group("data") if self._mesh is not None else None

    def _host_group(self) -> dist.ProcessGroup | None:
        """All ranks over the host's network, from set-up on; all ranks as they are before."""
        return None

    def host_axis(self) -> Axis:
        """All ranks over the host's network, from when they have found each other; collective at the first call."""
        group = groups_of_world(self.group_timeout).host()
        return Axis("world", self.world_size, self.global_rank, tuple(range(self.world_size)), group)

    def _reaches(self, tensor: Tensor, group: Any) -> bool:
        """Whether a group's collectives take a tensor where it lies: NCCL's take none on the CPU."""
        return tensor.device.type != "cpu" or not dist.is_initialized() or reaches_cpu(group)
