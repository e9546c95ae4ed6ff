"""The Lightning strategy: shards the model and the optimizer, and runs both through Lightning's own loops."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torchmetrics import Metric

from lightning_tex.optim import (
    OptimizerStateFormat,
    ZeroStage,
    users_own,
)
from lightning_tex.optim.rounding import RoundingSeed
from lightning_tex.parallel.activation_checkpointing import ActivationCheckpointing
from lightning_tex.parallel.allocator import keep_freed_memory
from lightning_tex.parallel.compiled import Compile, compile_leaves
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.expert_chunks import ExpertChunks
from lightning_tex.parallel.layout import Communication, Layout
from lightning_tex.parallel.topology import Topology
from lightning_tex.resilience.finite_watch import of_all_ranks
from lightning_tex.resilience.spikes import SpikeRule
from lightning_tex.saving import ShardedRun
from lightning_tex.strategy import agreement
from lightning_tex.strategy.averaging import AveragedWeights
from lightning_tex.strategy.loss_spikes import OnSpike
from lightning_tex.strategy.memory_check import memory_refusal
from lightning_tex.strategy.options import ShardingOptions
from lightning_tex.strategy.precision import tex_precision
from lightning_tex.strategy.random_state import data_rank_random_state
from lightning_tex.strategy.set_up import experts_of_layers, shard_model, sharded_optimizers
from lightning_tex.strategy.steps import StepStrategy
from lightning_tex.strategy.train_step import TrainStep
from lightning_tex.strategy.training_flops import TrainingFlops


class TexMoEStrategy(StepStrategy):
    """Train a LightningModule built of TEX layers with tensor x expert x data parallelism (arXiv 2303.06318).

    Use it as ``Trainer(strategy="tex_moe")`` or with arguments. The world is split twice (Eq. 1):
    ``tensor x data`` for ordinary parameters, ``expert_tensor x expert x expert_data`` for experts. TEX layers are
    sharded in place, everything else is replicated; the module's torch optimizer is sharded over replicas (ZeRO-1) and
    stepped in tiles.

    Args:
        accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin: as Lightning's own.
        tensor_parallel_size: ranks that share each matrix; divides the world.
        expert_parallel_size: ranks over which a layer's experts are spread; ``"auto"``: the largest legal value.
        expert_tensor_parallel_size: ranks that share one expert's matrices: ``None`` (the tensor size, TED) or 1
            (folding: experts stay whole and spread over tensor ranks too).
        sequence_parallel: between VocabParallelEmbedding and VocabParallelHead, split activations over tensor along
            the sequence, dim -2; needs both layers, and lengths that the tensor size divides.
        zero_stage: 0: each replica keeps all optimizer states; 1: they are sharded over replicas; 2: gradients too,
            which leave in every micro-batch's backward: ``.grad`` is ``None`` after it.
        tile_size: elements the optimizer updates at once; ``None``: as many as fit a fixed budget of temporary memory.
        optimizer_state_format: of bf16 parameters. ``"fp32"``: fp32 master and states; ``"split"``: the same numbers in
            2 bytes less per parameter; ``"int8"``: states in 8 bits; ``"stochastic"``: no master, states in bf16.
        duplicate_token_dropping: split the tokens that tensor ranks hold alike before the all-to-all (section 5.1).
        expert_chunks: chunks of a MoE layer's tokens, of which one travels between ranks while the experts compute
            another, forward and backward; ``"auto"``: 2 where the expert axis leaves nodes, else 1.
        activation_checkpointing: recompute the blocks' activations in the backward. ``"full"`` repeats their
            collectives; ``"communication_aware"`` replays what they gave in the first forward (section 5.2).
        activation_checkpointing_policy: module classes of the blocks; ``None``: elements of nn.ModuleLists that hold
            TEX layers.
        save_distributed_checkpoint: True: a checkpoint is a directory, each rank writing its part. False: one plain
            file that ``strategy="auto"`` and ``torch.load`` read.
        process_group_backend: ``None``: nccl on GPUs, gloo on CPUs.
        timeout: after which a collective that has not returned is a stall: the run ends, and the ranks that the others
            wait for are named. A timedelta or seconds; ``None``: 30 minutes.
        max_skipped_steps: a step with an infinite or NaN gradient on any rank is skipped on all; this many in a row end
            the training with an error that names a parameter. ``None``: such steps are taken. With a loss scale
            (16-mixed) infinite gradients count once it is 1, before that the loss alone does.
        background_saving: in a fit, a checkpoint directory is written beside training from a copy of the states in host
            memory; a failure is raised at the next step. False: training waits until it is written.
        check_replicas_every_n_steps: compare what ranks hold alike, such as norms, after steps 1, 2, 4, .., then every
            so many, and before saves; where copies differ, training ends, naming tensor, ranks, remedy. 0: never.
        on_spike, spike_rule: at a loss far above the last ones (:class:`SpikeRule`) ``"warn"``, ``"skip"`` the step, or
            ``"rewind"`` to the newest checkpoint's weights and states, data going on. ``None``: nothing is looked at.
        compile: make few kernels of element-wise and index work by ``torch.compile``: ``"auto"``: on GPUs, ``True``:
            everywhere, or fail, ``False``: nowhere. It holds for the process.
        check_memory: refuse at the start a training that by its plan does not fit the GPU (``lightning-tex plan``).
        init_from: a checkpoint, of any layout and form, whose weights a fit begins with that resumes from none.
        elastic: on a world that does not allow a size, as after a node was lost, take the largest divisor of it that it
            does allow, first of tensor, then of expert, and say so.

    Raises:
        ValueError: a layout that the world or the model does not allow, naming the option and the legal values.
        MisconfigurationException: something of the Trainer that the strategy cannot do, by name.
    """

    strategy_name = "tex_moe"

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
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
        process_group_backend: str | None = None,
        timeout: timedelta | float | None = default_pg_timeout,
        max_skipped_steps: int | None = 10,
        background_saving: bool = True,
        compile: Compile = "auto",
        check_memory: bool = True,
        check_replicas_every_n_steps: int = 100,
        on_spike: OnSpike = None,
        spike_rule: SpikeRule | None = None,
        init_from: str | os.PathLike[str] | None = None,
        elastic: bool = False,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__(
            check_replicas_every_n_steps=check_replicas_every_n_steps,
            on_spike=on_spike,
            spike_rule=spike_rule,
            arguments=arguments,
            distributed=save_distributed_checkpoint,
            background=background_saving,
            init_from=init_from,
            process_group_backend=process_group_backend,
            timeout=timeout,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self.options = ShardingOptions.among(arguments)
        self.communication = self.options.communication
        compile_leaves(compile)
        self._check_memory = check_memory
        self._averages = AveragedWeights(self.described_weights)
        self._synced_metrics: list[Metric] = []
        self._topology: Topology | None = None
        self._seed = 0

    @classmethod
    def of(cls, trainer: Trainer) -> Self:
        """The strategy of a Trainer that is known to run under it."""
        assert isinstance(trainer.strategy, cls)
        return trainer.strategy

    # --- layout and precision

    @property
    def topology(self) -> Topology:
        """All axes of the run. Exists from ``setup`` on."""
        if self._topology is None:
            raise RuntimeError("The topology exists only after the Trainer has set up the strategy")
        return self._topology

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_topology": None}

    def _run(self) -> ShardedRun:
        if self._topology is None and self.world_size == 1 and self.model is not None:
            # Asked for before set-up, where everything is whole.
            return ShardedRun(self.model, Topology.single(), None, self.broadcast, self.checkpoint_io)
        return super()._run()

    def _host_group(self) -> dist.ProcessGroup | None:
        return None if self._topology is None else self._topology.host.group

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Samplers split data over the data axis: ranks of one tensor group see one batch."""
        return self.options.sampler_place(self._topology, self.world_size, self.global_rank)

    def resolve_layout(self) -> Layout:
        return self.options.requested_layout.resolve(self.world_size, experts_of_layers(self.model))

    @property
    def precision_plugin(self) -> TrainStep:
        plugin = super().precision_plugin
        return plugin if isinstance(plugin, TrainStep) else tex_precision(plugin)

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        self._precision_plugin = None if plugin is None else tex_precision(plugin)

    # --- setting up

    def adopt(self, communication: Communication) -> None:
        """Before set-up: communicate so, in place of what the arguments say, which know no ``fused``, ``overlap``.

        Not for training but for what compares ways to communicate, such as ``lightning_tex.bench``.
        """
        self.communication = communication

    def setup_environment(self) -> None:
        assert self.lightning_module is not None
        self._refuse_what_is_not_supported(self.lightning_module.trainer)
        self.attend_callbacks(self.lightning_module.trainer)
        super().setup_environment()

    def _refuse_what_is_not_supported(self, trainer: Trainer) -> None:
        self.precision_plugin.state_config(self.options.state_config)
        if self._layer_sync is not None:
            raise MisconfigurationException("Trainer(sync_batchnorm=True) is not supported by TexMoEStrategy")
        pruned = any(isinstance(callback, ModelPruning) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if pruned and self.world_size > 1:
            raise MisconfigurationException(
                f"callback ModelPruning is not supported on {self.world_size} processes: it chooses masks in each rank "
                "alone; legal: one process, or prune a whole model after training, as "
                "`lightning-tex checkpoint consolidate` gives it"
            )
        self.check_checkpoint_io()
        AveragedWeights.require_legal(trainer, str(self.precision_plugin.precision))

    def setup(self, trainer: Trainer) -> None:
        """Shard the model for this rank, give it its memory and its optimizer. Idempotent over stages."""
        assert self.accelerator is not None and self.model is not None and self.lightning_module is not None
        self._require_agreement(agreement.model(self.lightning_module, trainer))
        self._require_agreement(agreement.data(trainer))
        self.accelerator.setup(trainer)
        layout = self.options.layout_of(self.model, self.world_size)
        if departures := self.options.requested_layout.departures(layout):
            rank_zero_info(f"elastic: the world has {self.world_size} ranks; {', '.join(departures)}")
        self.communication = self.options.communication_of(self.model, layout, self.num_processes, self.communication)
        if trainer.state.fn == TrainerFn.FITTING:
            self._require_memory(layout)
        if self._topology is None or self._topology.layout != layout:
            self._topology = Topology.build(
                layout, self.root_device.type, self._mesh, self.communication, self.group_timeout
            )
        self.model, seed = shard_model(
            self.model,
            self.topology,
            self.root_device,
            self.precision_plugin.convert_module,
            self.options.recompute,
            partial(self.initial_weights.expect, self.lightning_module),
        )
        self._seed = seed
        self._averages.attend(trainer, self.model, self.topology, self.root_device, seed)
        self._sync_metrics_over_data()
        data_rank_random_state(seed, self.topology.data)
        self.barrier()
        self.compare_steps_again()
        if trainer.state.fn == TrainerFn.FITTING:
            self.try_folders(trainer)
            self._forget_optimizers()
        self.restore(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if self.root_device.type == "cpu" and trainer.state.fn == TrainerFn.FITTING:
            keep_freed_memory()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """As :meth:`CheckpointingStrategy.load_checkpoint`; averages that begin with it find the weights there, too."""
        trainer_state = super().load_checkpoint(checkpoint_path, weights_only)
        if self._averages.are_kept:
            assert self.model is not None
            trainer_state.setdefault("state_dict", self.model.state_dict())
        return trainer_state

    def teardown(self) -> None:
        for config in self.lr_scheduler_configs:  # which may be of the user's making, and serve another fit
            config.scheduler.optimizer = users_own(config.scheduler.optimizer)
        self._averages.leave()
        while self._synced_metrics:
            self._synced_metrics.pop().process_group = None
        super().teardown()

    def _sync_metrics_over_data(self) -> None:
        """Let metrics be synchronised over data, where that is not what they do: over all ranks."""
        assert self.model is not None
        data = self.topology.data
        if data.size < self.topology.world.size:
            metrics = (module for module in self.model.modules() if isinstance(module, Metric))
            for metric in metrics:
                if metric.process_group is None:
                    metric.process_group = data.group
                    self._synced_metrics.append(metric)

    def _require_memory(self, layout: Layout) -> None:
        device_bytes = self._device_bytes()
        if self._check_memory and device_bytes is not None:
            options = self.memory_options(layout)
            refused = of_all_ranks(memory_refusal(**options, device_bytes=device_bytes), self.host_axis())
            if told := next((told for told in refused if told), None):
                raise UserValueError(told)

    def memory_options(self, layout: Layout) -> dict[str, Any]:
        """What a plan of a rank's memory is made of (:class:`~lightning_tex.strategy.memory_check.MemoryPlan`)."""
        return {
            "module": self.lightning_module,
            "layout": layout,
            "communication": self.communication,
            "state_config": self.precision_plugin.state_config(self.options.state_config),
            "recompute": self.options.activation_checkpointing,
            "precision": str(self.precision_plugin.precision),
            "policy": self.options.activation_checkpointing_policy,
        }

    @property
    def training_flops(self) -> TrainingFlops:
        """What a token of this training computes by the planner's formulas, and the devices' peak."""
        assert self.lightning_module is not None
        return TrainingFlops.of(self.lightning_module, self.root_device, str(self.precision_plugin.precision))

    def _device_bytes(self) -> int | None:
        """Memory of this rank's GPU; ``None`` on CPU, where ranks share what there is."""
        if self.root_device.type != "cuda":
            return None
        return int(torch.cuda.get_device_properties(self.root_device).total_memory)

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Build the user's optimizer over the sharded model and put the sharded, tiled one in its place."""
        self._forget_optimizers()
        super().setup_optimizers(trainer)
        assert self.model is not None
        parameters = dict(self.model.named_parameters())
        self._require_agreement(agreement.optimization(self.optimizers, self.lr_scheduler_configs, parameters, trainer))
        if not isinstance(self.optimizers[0], _MockOptimizer):  # configure_optimizers returned None
            state_config = self.precision_plugin.state_config(replace(self.options.state_config, seed=self._seed))
            seed = RoundingSeed(self._seed)
            tiled = sharded_optimizers(self.optimizers, self.model, self.topology, state_config, seed)
            self.optimizers = list(tiled.values())
            self.tiled_optimizers[0].buffers.attend(self.model)
            for config in self.lr_scheduler_configs:  # or a learning-rate monitor would find two optimizers
                config.scheduler.optimizer = tiled[users_own(config.scheduler.optimizer)]

    def _forget_optimizers(self) -> None:
        for optimizer in self.tiled_optimizers:
            optimizer.release()
        self._reset_optimizers_and_schedulers()

    def model_to_device(self) -> None:
        """Nothing: ``setup`` moves what exists and draws the rest where it belongs."""
