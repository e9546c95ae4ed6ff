"""Activations of any module by tracing: one micro-step for each way of running it that makes a difference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from lightning import LightningModule
from torch import nn

from lightning_tex.planner.batches import Batches
from lightning_tex.planner.few_blocks import FewBlocks
from lightning_tex.planner.instants import Instant
from lightning_tex.planner.layouts import ActivationSource, Candidate, Job
from lightning_tex.planner.micro_step_trace import KINDS, MicroStepTrace, trace_micro_step


class UntraceableError(Exception):
    """A micro-step that cannot be run without values; says why."""


class TracedActivations(ActivationSource):
    """What one forward and backward of a module's own training step hold.

    Layouts, recomputation, communication and micro-batch matter; ZeRO and formats of optimizer states do not. Of each
    way the first two micro-batches that are asked for are traced, others interpolated between them, operation by
    operation: bytes are proportional to samples, but for what does not depend on them. Of a language model whose blocks
    repeat a few are traced (:class:`FewBlocks`).

    Args:
        module: the module; left as it is.
        policy: as of :func:`trace_micro_step`.
        batches: likewise.
    """

    name = "traced"
    costly = True

    def __init__(self, module: LightningModule, policy: set[type[nn.Module]] | None, batches: Batches) -> None:
        self.module, self.policy, self.batches = module, policy, batches
        self.few = FewBlocks.of(module)
        self._traces: dict[tuple[object, ...], dict[int, MicroStepTrace]] = {}

    def instants(self, job: Job, candidate: Candidate, device: str) -> Iterator[Instant]:
        trace = self._trace(job, candidate, device)
        held = trace.live.sum(0)
        # Where gradients gather on the way, a later instant that holds less may be fuller.
        stretches = _stretches(trace.reached) if candidate.zero_stage == 2 else [slice(0, len(held))]
        for stretch in stretches:
            fullest = stretch.start + int(held[stretch].argmax())
            event = "forward" if fullest <= trace.forward else "backward"
            parts = dict(zip(KINDS, map(int, trace.live[:, fullest]), strict=True))
            yield Instant(event, **parts, reached=int(trace.reached[fullest]))

    def at_least(self, job: Job, candidate: Candidate, device: str) -> int:
        """What other micro-batches keep of a forward: the smaller ones at least that, a larger one in proportion."""
        traces, wanted = self._traces.get(_way(job, candidate, device), {}), candidate.micro_batch
        kept = {micro: int(trace.live[:, trace.forward].sum()) for micro, trace in traces.items()}
        return max((size * min(wanted, micro) // micro for micro, size in kept.items()), default=0)

    def _trace(self, job: Job, candidate: Candidate, device: str) -> MicroStepTrace:
        """That of a candidate, traced or interpolated.

        Raises:
            UntraceableError: the module cannot be traced so.
        """
        traces, wanted = self._traces.setdefault(_way(job, candidate, device), {}), candidate.micro_batch
        if wanted not in traces:
            if len(traces) >= 2 and (interpolated := _interpolated(traces, wanted)) is not None:
                return interpolated
            traces[wanted] = self._traced(job, candidate, device)
        return traces[wanted]

    def _traced(self, job: Job, candidate: Candidate, device: str) -> MicroStepTrace:
        given = self.policy, self.batches, job, candidate, device
        try:
            if self.few is not None:
                few = trace_micro_step(self.few.module, *given, self.few.marks)
                if (extended := self.few.extended(few)) is not None:
                    return extended
            return trace_micro_step(self.module, *given)
        except Exception as error:
            said = (str(error).splitlines() or [""])[0]
            raise UntraceableError(f"{type(error).__name__}: {said} (on {candidate.layout})") from error


def _way(job: Job, candidate: Candidate, device: str) -> tuple[object, ...]:
    """All that matters but the micro-batch."""
    return (
        candidate.layout, candidate.communication, candidate.activation_checkpointing, job.sequence_length,
        job.precision, job.imbalance, device,
    )  # fmt: skip


def _stretches(reached: np.ndarray) -> list[slice]:
    """The stretches of operations between which the backward gets further."""
    starts = [0, *(np.flatnonzero(np.diff(reached)) + 1).tolist()]
    return [slice(*ends) for ends in zip(starts, [*starts[1:], len(reached)], strict=True)]


def _interpolated(traces: dict[int, MicroStepTrace], wanted: int) -> MicroStepTrace | None:
    """By two other micro-batches; ``None`` if their operations differ."""
    small, large = sorted(traces)[-2:]
    low, high = traces[small], traces[large]
    if not low.alike(high):
        return None
    share = (wanted - small) / (large - small)
    live = np.rint(low.live + share * (high.live - low.live)).astype(np.int64)
    return replace(low, live=live)
