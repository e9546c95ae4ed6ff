"""A layout that does not fit the GPU is refused at the start, with what it needs and what would fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lightning import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_tex.data import TokenDataModule
from lightning_tex.optim import OptimizerStateConfig
from lightning_tex.parallel.layout import Communication, Layout
from lightning_tex.parallel.precision import PRECISIONS
from lightning_tex.planner.batches import Batches, GrownBatch, TokenBlocks, batches_of
from lightning_tex.planner.cluster import CLUSTERS
from lightning_tex.planner.describe import describe
from lightning_tex.planner.layouts import ActivationCheckpointing, Candidate, Choices, Job
from lightning_tex.planner.memory import Memory, activation_source, memory, size
from lightning_tex.planner.optimizer_trial import read_optimizer
from lightning_tex.planner.search import Planned, plan_all
from lightning_tex.planner.states_only import StatesOnly
from lightning_tex.planner.traced import TracedActivations, UntraceableError
from lightning_tex.strategy.data_sources import TogetherSource

# Plans and steps agree within this share (docs/planner.md): less than that over the memory may fit.
MARGIN = 0.05
_NEAREST = 3


def memory_refusal(
    module: LightningModule,
    layout: Layout,
    communication: Communication,
    state_config: OptimizerStateConfig,
    recompute: ActivationCheckpointing,
    precision: str,
    device_bytes: int,
    policy: set[type[nn.Module]] | None = None,
) -> str | None:
    """Why a training is refused whose plan needs more memory than a rank's device has; ``None``: it fits.

    States are those of the module and its optimizer. Activations are foreseen by formulas, where the module trains a
    decoder and its data module says how long and how many its sequences are; else by tracing one micro-step on the
    Trainer's data; where that is not possible, states alone are compared. Nothing is foreseen for a precision plugin
    of the user's own.

    Args:
        module: the model, built (on the meta device or not).
        layout, communication, state_config, recompute, precision, policy: of the training.
        device_bytes: memory of a rank's device.

    Returns:
        what the memory would be taken by, and the nearest layouts that fit.
    """
    plan = MemoryPlan.of(module, layout, communication, state_config, recompute, precision, policy)
    if plan is None or plan.needed.peak * (1 - MARGIN) <= device_bytes:
        return None
    return (
        f"this layout ({layout}) needs about {size(plan.needed.peak)} on each of {layout.world} ranks, and a GPU has "
        f"{size(device_bytes)}: {plan.breakdown()}. {_nearest(plan.job, plan.candidate, device_bytes)}; "
        "`lightning-tex plan` shows all; TexMoEStrategy(check_memory=False) tries nevertheless"
    )


@dataclass(frozen=True)
class MemoryPlan:
    """What a rank of a training needs.

    Args:
        job: the training.
        candidate: its layout and options.
        needed: memory of a rank.
    """

    job: Job
    candidate: Candidate
    needed: Memory

    @classmethod
    def of(
        cls,
        module: LightningModule,
        layout: Layout,
        communication: Communication,
        state_config: OptimizerStateConfig,
        recompute: ActivationCheckpointing,
        precision: str,
        policy: set[type[nn.Module]] | None = None,
        trace: bool = True,
    ) -> MemoryPlan | None:
        """That of a training; ``None`` for a precision of the user's own.

        Args:
            module, layout, communication, state_config, recompute, precision, policy: as of :func:`memory_refusal`.
            trace: whether activations that no formula gives may be found by a dry run of a micro-step.
        """
        if precision not in PRECISIONS:
            return None
        job = _job(module, layout, precision, policy)
        if not trace and job.activations is not None:
            job = replace(job, activations=StatesOnly("no formula has them"))
        share = job.global_batch_size // layout.data
        candidate = Candidate(
            layout, share, 1, state_config.zero_stage, recompute, state_config.optimizer_state_format, communication
        )
        try:
            needed = memory(job, candidate, tile_size=state_config.tile_size)
        except UntraceableError as error:
            job = replace(job, activations=StatesOnly(str(error)))
            needed = memory(job, candidate, tile_size=state_config.tile_size)
        return cls(job, candidate, needed)

    def breakdown(self) -> str:
        """What takes how much, and what that rests on."""
        parts = ", ".join(f"{name} {size(taken)}" for name, taken in self.needed.parts().items() if taken)
        return f"{parts} ({_counted(self.job, self.candidate.micro_batch)})"


def _counted(job: Job, share: int) -> str:
    """What the plan rests on, in words."""
    source, optimizer = activation_source(job), job.optimizer
    states = f"states of {optimizer.name}" + (f", assumed since {optimizer.assumed}" if optimizer.assumed else "")
    if source.name == StatesOnly.name:
        return f"{states}; without activations: {source.reason}"
    return f"{states}; activations of micro-batches of {share}: {source.name}"


def _job(module: LightningModule, layout: Layout, precision: str, policy: set[type[nn.Module]] | None) -> Job:
    model, optimizer = describe(module, policy), read_optimizer(module)
    data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
    length, batch = getattr(data, "sequence_length", None), getattr(data, "global_batch_size", None)
    job = Job(model, layout.world, layout.tensor, layout.data, precision, optimizer=optimizer)
    told = False
    if isinstance(length, int) and isinstance(batch, int) and batch % layout.data == 0:
        told, job = True, replace(job, sequence_length=length, global_batch_size=batch)
        job = replace(job, document_mask=getattr(data, "document_mask", False) is True)
        if model.declared:
            return job
    try:
        if isinstance(data, TokenDataModule):
            batches: Batches = TokenBlocks(data.vocab_size, data.document_mask)
        else:
            loader = _train_loader(module)
            batches = batches_of(loader, may_iterate=False)
            job = job if told else replace(job, global_batch_size=_samples(loader, batches) * layout.data)
    except Exception as error:
        said = (str(error).splitlines() or [""])[0]
        return replace(job, activations=StatesOnly(f"no batch of its data: {type(error).__name__}: {said}"))
    return replace(job, activations=TracedActivations(module, policy, batches))


def _train_loader(module: LightningModule) -> Any:
    """The loader of the fit that begins."""
    trainer: Any = module.trainer
    with isolate_rng():
        source = trainer.fit_loop._data_source
        return source.users_own() if isinstance(source, TogetherSource) else source.dataloader()


def _samples(loader: Any, batches: GrownBatch) -> int:
    """Samples of one batch of a loader."""
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) else batches.samples


def _nearest(job: Job, candidate: Candidate, device_bytes: int) -> str:
    """The layouts that fit and differ in the fewest options."""
    cluster = replace(CLUSTERS["h100"], memory_bytes=float(device_bytes), reserved_bytes=0.0)
    communication = candidate.communication
    choices = Choices(
        duplicate_token_dropping=communication.duplicate_token_dropping, expert_chunks=communication.expert_chunks
    )
    wanted = candidate.options()

    def distance(planned: Planned) -> tuple[int, float]:
        return _changed(planned.candidate, wanted), planned.memory.peak

    try:
        fitting = plan_all(job, cluster, choices, _NEAREST, lambda other: _changed(other, wanted)).fitting
    except (ValueError, UntraceableError):
        fitting = []
    if not fitting:
        return "No layout of so many ranks fits"
    told = [_told(planned.candidate, planned.memory, wanted) for planned in sorted(fitting, key=distance)[:_NEAREST]]
    return f"What fits, nearest first: {'; '.join(told)}"


def _changed(candidate: Candidate, wanted: dict[str, object]) -> int:
    """How many options are others than wanted."""
    options = candidate.options()
    return sum(options[key] != value for key, value in wanted.items())


def _told(candidate: Candidate, needed: Memory, wanted: dict[str, object]) -> str:
    changed = {key: value for key, value in candidate.options().items() if value != wanted[key]}
    return f"{', '.join(f'{key}={value!r}' for key, value in changed.items())} ({size(needed.peak)})"
