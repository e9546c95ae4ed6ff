"""A layout that does not fit the GPU is refused at the start, with what it needs and what would fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lightning import LightningModule
from torch import nn

from lightning_tex.models import LanguageModel
from lightning_tex.optim import OptimizerStateConfig
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.precision import PRECISIONS
from lightning_tex.parallel.topology import Communication, Layout
from lightning_tex.planner.cluster import CLUSTERS
from lightning_tex.planner.describe import describe
from lightning_tex.planner.layouts import ActivationCheckpointing, Candidate, Choices, Job
from lightning_tex.planner.memory import Memory, memory, size
from lightning_tex.planner.search import Planned, plan_all

# Plans and steps agree within this share (docs/planner.md): less than that over the memory may fit.
MARGIN = 0.05
_NEAREST = 3


def require_memory(
    module: LightningModule,
    layout: Layout,
    communication: Communication,
    state_config: OptimizerStateConfig,
    recompute: ActivationCheckpointing,
    precision: str,
    device_bytes: int,
    policy: set[type[nn.Module]] | None = None,
) -> None:
    """Refuse a training whose plan needs more memory than a rank's device has.

    States are those of any module. Activations are foreseen of a decoder, where the data module says how long and how
    many its sequences are; else states alone are compared. Nothing is foreseen for a precision
    plugin of the user's own.

    Args:
        module: the model, built (on the meta device or not).
        layout, communication, state_config, recompute, precision, policy: of the training.
        device_bytes: memory of a rank's device.

    Raises:
        ValueError: with what the memory would be taken by, and the nearest layouts that fit.
    """
    plan = MemoryPlan.of(module, layout, communication, state_config, recompute, precision, policy)
    if plan is None or plan.needed.peak * (1 - MARGIN) <= device_bytes:
        return
    raise UserValueError(
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
    ) -> MemoryPlan | None:
        """That of a training; ``None`` for a precision of the user's own. Arguments: :func:`require_memory`."""
        if precision not in PRECISIONS:
            return None
        job = _job(module, layout, precision, policy)
        share = job.global_batch_size // layout.data
        candidate = Candidate(
            layout, share, 1, state_config.zero_stage, recompute, state_config.optimizer_state_format, communication
        )
        return cls(job, candidate, memory(job, candidate, tile_size=state_config.tile_size))

    def breakdown(self) -> str:
        """What takes how much, and of which batches."""
        parts = ", ".join(f"{name} {size(taken)}" for name, taken in self.needed.parts().items() if taken)
        counted = (
            f"micro-batches of {self.candidate.micro_batch} x {self.job.sequence_length} tokens"
            if self.job.model.activations == "formulas"
            else "without activations, which are not foreseen for this module and its data"
        )
        return f"{parts} ({counted})"


def _job(module: LightningModule, layout: Layout, precision: str, policy: set[type[nn.Module]] | None) -> Job:
    model = describe(module, policy)
    data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
    length, batch = getattr(data, "sequence_length", None), getattr(data, "global_batch_size", None)
    if not isinstance(length, int) or not isinstance(batch, int) or batch % layout.data:
        model, length, batch = model.without_activations(), layout.tensor, layout.data
    return Job(model, layout.world, length, batch, precision, two_groups=isinstance(module, LanguageModel))


def _nearest(job: Job, candidate: Candidate, device_bytes: int) -> str:
    """The layouts that fit and differ in the fewest options."""
    cluster = replace(CLUSTERS["h100"], memory_bytes=float(device_bytes), reserved_bytes=0.0)
    choices = Choices(duplicate_token_dropping=candidate.communication.duplicate_token_dropping)
    wanted = candidate.options()

    def distance(planned: Planned) -> tuple[int, float]:
        options = planned.candidate.options()
        return sum(options[key] != value for key, value in wanted.items()), planned.memory.peak

    try:
        fitting = plan_all(job, cluster, choices).fitting
    except ValueError:
        fitting = []
    if not fitting:
        return "No layout of so many ranks fits"
    told = [_told(planned.candidate, planned.memory, wanted) for planned in sorted(fitting, key=distance)[:_NEAREST]]
    return f"What fits, nearest first: {'; '.join(told)}"


def _told(candidate: Candidate, needed: Memory, wanted: dict[str, object]) -> str:
    changed = {key: value for key, value in candidate.options().items() if value != wanted[key]}
    return f"{', '.join(f'{key}={value!r}' for key, value in changed.items())} ({size(needed.peak)})"
