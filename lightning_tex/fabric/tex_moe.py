"""The Fabric strategy: the sharded model, the optimizer step and the checkpoints of the Trainer's strategy."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.accelerators import Accelerator
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.plugins import Precision as FabricPrecision
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_tex.fabric import checkpoints
from lightning_tex.optim import (
    OptimizerStateFormat,
    ReductionStage,
    TiledOptimizer,
    ZeroStage,
    users_own,
)
from lightning_tex.optim.forward_overlap import ForwardOverlap
from lightning_tex.optim.rounding import RoundingSeed
from lightning_tex.parallel.activation_checkpointing import ActivationCheckpointing
from lightning_tex.parallel.allocator import keep_freed_memory, use_growing_segments
from lightning_tex.parallel.compiled import Compile, compile_leaves
from lightning_tex.parallel.errors import UserRuntimeError, UserValueError
from lightning_tex.parallel.expert_chunks import ExpertChunks
from lightning_tex.parallel.topology import Topology
from lightning_tex.saving import CheckpointFormat, DirectoryCheckpoint, PlainCheckpoint, ShardedRun, SideGroup
from lightning_tex.strategy.options import ShardingOptions
from lightning_tex.strategy.precision import tex_precision
from lightning_tex.strategy.random_state import data_rank_random_state
from lightning_tex.strategy.set_up import shard_model, sharded_optimizers
from lightning_tex.strategy.train_step import TrainStep, reached


class _OncePerStep(_BackwardSyncControl):
    """Gradients are combined once for a step anyway: ``no_backward_sync`` has nothing to leave out."""

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """Nothing. Under ZeRO 2, which keeps no gradients between backwards, they leave all the same."""
        return nullcontext()


class TexMoEStrategy(DDPStrategy):
    """Train a module built of TEX layers in a loop of one's own: ``Fabric(strategy=TexMoEStrategy(..))``.

    The model is sharded in place by ``fabric.setup`` or ``fabric.setup_module``, and its optimizers are sharded and
    stepped in tiles as under :class:`lightning_tex.TexMoEStrategy`, whose options these are. ``fabric.backward``,
    ``clip_gradients`` and ``optimizer.step`` are one rank's part of the step of all; auxiliary losses are the loop's to
    add (:func:`lightning_tex.moe.auxiliary_loss`). Checkpoints are those of a Trainer, to any layout.

    Args:
        accelerator, parallel_devices, cluster_environment, checkpoint_io, precision, process_group_backend, timeout: as
            of Fabric's ``DDPStrategy``.
        tensor_parallel_size, expert_parallel_size, expert_tensor_parallel_size, sequence_parallel: of the layout.
        zero_stage, tile_size, optimizer_state_format, max_skipped_steps: of the optimizer.
        duplicate_token_dropping, expert_chunks: of communication.
        activation_checkpointing, activation_checkpointing_policy: of recomputation.
        save_distributed_checkpoint, compile: as the others those of :class:`lightning_tex.TexMoEStrategy`.

    Raises:
        ValueError: a layout that the world or the model does not allow, naming the option and the legal values.
    """

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: FabricPrecision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        tensor_parallel_size: int = 1,
        expert_parallel_size: int | Literal["auto"] = "auto",
        expert_tensor_parallel_size: int | None = None,
        sequence_parallel: bool = False,
        zero_stage: ZeroStage = 1,
        tile_size: int | None = None,
        optimizer_state_format: OptimizerStateFormat = "fp32",
        duplicate_token_dropping: bool = True,
        expert_chunks: ExpertChunks = "auto",
        activation_checkpointing: ActivationCheckpointing = None,
        activation_checkpointing_policy: set[type[nn.Module]] | None = None,
        save_distributed_checkpoint: bool = True,
        max_skipped_steps: int | None = 10,
        compile: Compile = "auto",
    ) -> None:
        self.options = ShardingOptions.among(locals())
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision=precision,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self._backward_sync_control = _OncePerStep()
        self.communication = self.options.communication
        compile_leaves(compile)
        self._form: CheckpointFormat = DirectoryCheckpoint() if save_distributed_checkpoint else PlainCheckpoint()
        self._topology: Topology | None = None
        self._module: nn.Module | None = None
        self._rounding_seed = RoundingSeed()
        self._optimizers: list[TiledOptimizer] = []
        self._side_group: SideGroup | None = None

    # --- layout and precision

    @property
    def topology(self) -> Topology:
        """All axes of the run. Exists once a module has been set up."""
        if self._topology is None:
            raise UserRuntimeError("the topology exists only after fabric.setup(module, ..)")
        return self._topology

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Samplers split data over the data axis: ranks of one tensor group see one batch."""
        return self.options.sampler_place(self._topology, self.world_size, self.global_rank)

    @property
    def precision(self) -> TrainStep:
        plugin = self._precision
        return plugin if isinstance(plugin, TrainStep) else tex_precision(plugin or FabricPrecision(), UserValueError)

    @precision.setter
    def precision(self, plugin: FabricPrecision | None) -> None:
        self._precision = None if plugin is None else tex_precision(plugin, UserValueError)

    # --- setting up

    def setup_environment(self) -> None:
        if self.root_device.type == "cuda":
            use_growing_segments()
        super().setup_environment()

    def module_to_device(self, module: nn.Module) -> None:
        """Nothing: :meth:`setup_module` moves a rank's part, which may fit where a whole model does not."""

    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        """Shard a module in place; collective.

        Raises:
            RuntimeError: another one has been set up.
            ValueError: a layout that the model does not allow.
        """
        if self._module is not None:
            raise UserRuntimeError("fabric.setup: another module is sharded already; legal: one module for a Fabric")
        layout = self.options.layout_of(module, self.world_size)
        self.communication = self.options.communication_of(module, layout, self.num_processes, self.communication)
        self._topology = Topology.build(
            layout, self.root_device.type, communication=self.communication, timeout=self._timeout
        )
        convert = self.precision.convert_module
        self._module, seed = shard_model(module, self._topology, self.root_device, convert, self.options.recompute)
        self._rounding_seed = RoundingSeed(seed)
        data_rank_random_state(seed, self._topology.data)
        return self._module

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """Shard a module and its optimizers, which a scheduler finds in the places of the user's."""
        module = self.setup_module(module)
        sharded = self._shard(optimizers)
        if scheduler is not None:
            scheduler.optimizer = sharded[users_own(scheduler.optimizer)]
        return module, list(sharded.values()), scheduler

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Shard one optimizer of the module that has been set up."""
        return self._shard([optimizer])[optimizer]

    def _shard(self, optimizers: list[Optimizer]) -> dict[Optimizer, TiledOptimizer]:
        if self._module is None:
            raise UserRuntimeError("fabric.setup_optimizers: legal after fabric.setup_module(module)")
        stepped = {id(p) for one in self._optimizers for group in one.param_groups for p in group["params"]}
        if any(id(p) in stepped for one in optimizers for group in one.param_groups for p in group["params"]):
            raise UserValueError(
                "a parameter is in an optimizer that has been set up already, which has laid it out; legal: "
                "fabric.setup(module, first, second) for optimizers that share parameters"
            )
        config = self.precision.state_config(replace(self.options.state_config, seed=self._rounding_seed.seed))
        sharded = sharded_optimizers(optimizers, self._module, self.topology, config, self._rounding_seed)
        self._optimizers += sharded.values()
        buffers = next(iter(sharded.values())).buffers  # of all
        buffers.attend(self._module)
        atexit.register(_wait, weakref.ref(buffers.gathering))
        if self.root_device.type == "cpu":
            keep_freed_memory()
        return sharded

    def process_dataloader(self, dataloader: DataLoader) -> DataLoader:
        """Seed workers by data rank, as tensor ranks must see one batch."""
        begins = dataloader.worker_init_fn
        if isinstance(begins, partial) and begins.func is pl_worker_init_function:
            rank = self.distributed_sampler_kwargs["rank"]
            dataloader.worker_init_fn = partial(pl_worker_init_function, rank=rank)
        return dataloader

    # --- the step

    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """One backward of a step, of which there may be several; collective under ZeRO 2."""
        told = reached(self._optimizers)
        for optimizer in told:
            optimizer.backward_begins(tensor)
        self.precision.scaled(tensor).backward(*args, **kwargs)
        for optimizer in told:
            optimizer.backward_ended()

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Combine gradients, step, and let routers act; collective."""
        result = None if closure is None else closure()
        assert self._module is not None
        self.precision.take_step(optimizer, self._module, **kwargs)
        return result

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Any,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Scale gradients so that their 2-norm over all ranks is at most ``max_norm``; collective.

        Returns:
            the norm before.

        Raises:
            ValueError: another norm.
            RuntimeError: the norm is not finite, if that is an error; not where a loss scale decides.
        """
        if norm_type != 2:
            raise UserValueError(f"clip_gradients(norm_type={norm_type}); legal: 2.0")
        norm = self.precision.clipped_by_norm(optimizer, max_norm)
        if error_if_nonfinite and optimizer.reduction_stage is not ReductionStage.UNSCALED and not norm.isfinite():
            raise UserRuntimeError(
                f"the norm of the gradients is {float(norm)}, so they cannot be clipped; legal: "
                "clip_gradients(error_if_nonfinite=False), which leaves the step to max_skipped_steps"
            )
        return norm

    def clip_gradients_value(self, module: nn.Module, optimizer: Any, clip_val: float) -> None:
        """Clamp every gradient element to [-clip_val, clip_val]; collective."""
        self.precision.clip_grad_by_value(optimizer, clip_val)

    # --- checkpoints

    def _run(self) -> ShardedRun:
        assert self._module is not None
        return ShardedRun(self._module, self.topology, None, self.broadcast, self.checkpoint_io)

    def save_checkpoint(
        self, path: Any, state: dict[str, Any], storage_options: Any = None, filter: Any = None
    ) -> None:
        """Write a state; collective. See :func:`lightning_tex.fabric.checkpoints.save`."""
        checkpoints.require_no_filter(filter)
        self._form.check_io(self.checkpoint_io)
        checkpoints.save(self._form, self._run(), self._optimizers, path, state, self._writers)

    def _writers(self) -> SideGroup:
        if self._side_group is None:
            self._side_group = SideGroup(self.topology.world, self._timeout or default_pg_timeout)
        return self._side_group

    def load_checkpoint(
        self, path: Any, state: Any = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint into a state; collective. See :func:`lightning_tex.fabric.checkpoints.load`."""
        given = {"module": state} if isinstance(state, nn.Module) else state or {}
        return checkpoints.load(self._run(), self._optimizers, path, given, strict, weights_only)

    # --- communication

    def all_reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce over the data axis: ranks of one tensor group hold equal values, which count once."""
        return super().all_reduce(tensor, self._data_group(group), reduce_op)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gather over the data axis: [..] -> [data, ..]."""
        return super().all_gather(tensor, self._data_group(group), sync_grads)

    def _data_group(self, asked: Any) -> Any:
        """The data axis in the place of all ranks, which Fabric names where its user names none."""
        everybody = asked is None or asked is dist.group.WORLD
        return self._topology.data.group if everybody and self._topology is not None else asked


def _wait(gathering: weakref.ref[ForwardOverlap]) -> None:
    """A rank that ended before would take its part of the parameters from the others."""
    if (under_way := gathering()) is not None:
        under_way.wait_for_all()
