"""What the ranks of a run must have in common in every step: batches over tensor, a loss on each, and the same end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from lightning import Trainer
from lightning.fabric.utilities.seed import pl_worker_init_function

from lightning_tex.data.on_data_axis import DataAxisLoader
from lightning_tex.data.workers import SparedWorker, named_worker_errors
from lightning_tex.moe import auxiliary_loss
from lightning_tex.parallel.errors import UserRuntimeError
from lightning_tex.parallel.flight_record import TRAINING
from lightning_tex.resilience.spikes import SpikeRule
from lightning_tex.strategy.batches import require_same_batch
from lightning_tex.strategy.checkpointing import CheckpointingStrategy
from lightning_tex.strategy.data_sources import take_over_sources
from lightning_tex.strategy.logged_names import LoggedNames
from lightning_tex.strategy.loss_spikes import LossSpikes, OnSpike
from lightning_tex.strategy.nonfinite_steps import SkippedSteps
from lightning_tex.strategy.out_of_memory import named_out_of_memory
from lightning_tex.strategy.replica_checks import ReplicaChecks
from lightning_tex.strategy.room_check import require_room
from lightning_tex.strategy.stopping import AgreedSignals, Stopping
from lightning_tex.strategy.uneven_evaluation import run_until_all_are_done
from lightning_tex.strategy.whole_summary import whole_summaries

# Steps whose batches are compared over the tensor axis, and logged names over data, from the start of every stage.
_COMPARED_STEPS = 3


class StepStrategy(CheckpointingStrategy):
    """A strategy whose loaders begin and end together on all ranks, and whose steps refuse what ranks differ in.

    Args:
        check_replicas_every_n_steps: compare copies so often; 0: never.
        on_spike, spike_rule: what is done about a loss that jumps, and when it does.
        options: see :class:`CheckpointingStrategy`.
    """

    def __init__(
        self, check_replicas_every_n_steps: int, on_spike: OnSpike, spike_rule: SpikeRule | None, **options: Any
    ) -> None:
        super().__init__(**options)
        self._replicas = ReplicaChecks(self, check_replicas_every_n_steps)
        self.skipped_steps = SkippedSteps(self)
        self.spikes = LossSpikes(self, on_spike, spike_rule)
        self._compared: Counter[Any] = Counter()
        self._logged_names: LoggedNames | None = None
        self._stopping: Stopping | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_logged_names": None, "_stopping": None}

    @contextmanager
    def run_frame(self, trainer: Trainer) -> Iterator[None]:
        """The context of a whole run: signals stop all ranks together."""
        if self._stopping is None or self._stopping.trainer is not trainer:
            self._stopping = Stopping(self, trainer)
        trainer._signal_connector = AgreedSignals(trainer, self._stopping)
        if self.world_size > 1:
            take_over_sources(trainer, self.host_axis)
        with (
            super().run_frame(trainer),
            named_worker_errors(self.global_rank),
            named_out_of_memory(self, trainer),
            whole_summaries(trainer, lambda: self.topology),
        ):
            yield

    def compare_steps_again(self) -> None:
        """Compare the first batches of every stage over tensor and logged names over data, as at the start."""
        self._compared.clear()
        data = self.topology.data
        self._logged_names = LoggedNames(self._agreement(data.ranks, "logged"))

    def process_dataloader(self, dataloader: object) -> object:
        """Give a loader on the data axis its place; seed workers by data rank, and leave signals to ranks."""
        if isinstance(dataloader, DataAxisLoader) and self.lightning_module is not None:
            dataloader.place(self.distributed_sampler_kwargs, self.lightning_module.trainer)
        begins: Any = getattr(dataloader, "worker_init_fn", False)
        if begins is not False and not isinstance(begins, SparedWorker):
            begins = begins or partial(_seed_worker, rank=self.distributed_sampler_kwargs["rank"])
            if self._stopping is not None:  # else asked for outside a run
                begins = SparedWorker(self._stopping.signals, begins)
            with suppress(ValueError, AttributeError):
                dataloader.worker_init_fn = begins  # type: ignore[attr-defined]
        return dataloader

    def on_train_start(self) -> None:
        super().on_train_start()
        self._replicas.fit_begins()
        assert self.lightning_module is not None
        require_room(self, self.lightning_module.trainer)
        if self.tiled_optimizers:
            self.skipped_steps.attend(self.tiled_optimizers)

    def step_boundary(self) -> None:
        """Between two batches of a fit, and after the last; collective.

        Raises:
            NonFiniteSteps: too many steps were skipped in a row.
            ReplicasDiffer: ranks hold different values of what they must hold alike.
        """
        assert self.lightning_module is not None
        self.skipped_steps.step_boundary()
        self.spikes.step_boundary()
        self._replicas.step_boundary(self.lightning_module.trainer.global_step)

    def on_train_end(self) -> None:
        for optimizer in self.tiled_optimizers:
            optimizer.guard.learn()
            optimizer.wait_for_parameters()
        self.step_boundary()
        super().on_train_end()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self._trainer is not None:  # else asked for outside a run
            self._replicas.before_save()
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.model is not None and self.lightning_module is not None
        TRAINING.step = self.lightning_module.trainer.global_step
        with self._compared_step(args, kwargs):
            self.continue_random_streams()
            self.skipped_steps.batch_begins(args[0])
            auxiliary_loss(self.model)  # what an aborted step left behind
            output = self._without_end_of_iteration(super().training_step, *args, **kwargs)
        if output is None and self.lightning_module.automatic_optimization and self.topology.world.size > 1:
            raise UserRuntimeError(
                f"training_step returned None on rank {self.global_rank}: without a backward of its own it would leave "
                f"the other {self.topology.world.size - 1} ranks waiting in theirs. Legal: a loss on every rank, "
                "0 * loss where a batch is to count for nothing; None in a run of one process"
            )
        return output

    def _without_end_of_iteration(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Lightning's loop takes it for the end of the epoch, here and on no other rank."""
        try:
            return step(*args, **kwargs)
        except StopIteration as error:
            if self.topology.world.size == 1:
                raise
            raise UserRuntimeError(
                f"training_step raised StopIteration on rank {self.global_rank}: most likely by next() of an iterator "
                "of your own that has run out. Legal: next(iterator, default), or begin the iterator again; in a run "
                "of one process it ends the epoch"
            ) from error

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate(super().validation_step, *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate(super().test_step, *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate(super().predict_step, *args, **kwargs)

    def _evaluate(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def compared_step() -> Any:  # a rank that repeats its last batch takes part in votes and comparison, too
            assert self._stopping is not None
            self._stopping.evaluation_boundary()
            self.continue_random_streams()
            with self._compared_step(args, kwargs):
                return step(*args, **kwargs)

        output = compared_step()
        assert self.lightning_module is not None
        loader = args[2] if len(args) > 2 else 0  # (batch, batch_idx[, dataloader_idx])
        run_until_all_are_done(self.lightning_module, compared_step, loader, self.topology.host)
        return output

    @contextmanager
    def _compared_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """One of the first steps of a stage refuses another batch over tensor, and another name logged over data."""
        assert self.lightning_module is not None and self._logged_names is not None
        stage = self.lightning_module.trainer.state.stage
        compared = self._compared[stage] < _COMPARED_STEPS
        self._compared[stage] += compared
        if compared and self.topology.tensor.size > 1:
            require_same_batch((args, kwargs), self.topology.tensor, self.topology.host)
        yield
        if compared:
            self._logged_names.step_ends()

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """As :meth:`MeshStrategy.reduce`; refuses names that only some ranks log."""
        if group is None and self._logged_names is not None and self._trainer is not None:
            self._logged_names.reduction_begins(self._trainer)
        return super().reduce(tensor, group, reduce_op)


def _seed_worker(worker_id: int, rank: int) -> None:
    pl_worker_init_function(worker_id, rank)
