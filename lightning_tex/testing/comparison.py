"""One job on several layouts, compared with one process."""

from __future__ import annotations

from copy import deepcopy

from lightning_tex.parallel.errors import UserError, UserRuntimeError, UserValueError
from lightning_tex.parallel.layout import Layout
from lightning_tex.testing.batches import joined, require_samples, same_samples, samples_of
from lightning_tex.testing.differences import Difference, differences
from lightning_tex.testing.layouts import Run
from lightning_tex.testing.reasons import likely_reason, reason_for_error, sampler_reason
from lightning_tex.testing.runs import (
    Job,
    Outcome,
    first_told,
    global_batches,
    has_loader,
    on_layout,
    outcomes_of,
    own_batches,
    reference,
)
from lightning_tex.testing.sliced_capacity import has_capacity
from lightning_tex.testing.verdict import Verdict


class DoesNotTrain(UserRuntimeError, AssertionError):
    """A module fails in one process already, with its error and where it was raised."""


class Comparison:
    """The references of one job, and the verdict on each layout.

    Args:
        job: what is trained.
        tolerance: relative 2-norm per tensor.
        timeout: seconds after which a run counts as hanging.

    Raises:
        UserValueError: the data gave no batches, or batches without tensors; or the module takes no optimizer step.
        DoesNotTrain: the module fails in one process.
    """

    def __init__(self, job: Job, tolerance: float, timeout: float) -> None:
        self.job, self.tolerance, self.timeout = job, tolerance, timeout
        module, data = job.build()
        self.module = deepcopy(module)  # to look at: each process configures its own
        self.module.configure_model()
        self._has_loader = has_loader(data)
        taken = _require_trained(outcomes_of(1, global_batches, job, timeout=timeout)[0])
        self.batches = taken.batches
        require_samples(self.batches)
        _require_steps(taken.steps)
        self._references: dict[int, Outcome] = {}

    def verdict(self, run: Run) -> Verdict:
        """Train on a layout and compare."""
        try:
            layout = run.resolve(self.module)
        except UserError as error:
            return Verdict(run, error=f"not legal: {error}")
        samples = next((n for n in map(samples_of, self.batches) if n % layout.data), None)
        if samples is not None:
            return Verdict(run, layout, skipped=f"a batch of {samples} samples for {layout.data} data ranks")
        one_process = self._reference(layout.data if has_capacity(self.module) else 1)
        if one_process.error is not None:
            return Verdict(run, layout, skipped=f"in one process: {one_process.error}")
        outcomes = outcomes_of(run.devices, on_layout, self.job, self.batches, run, timeout=self.timeout)
        told = first_told(outcomes)
        if told.error is not None:
            cause = reason_for_error(self.module, one_process.record, told)
            return Verdict(run, layout, error=_raised(told), reason=cause)
        return self._compared(run, layout, one_process, outcomes)

    def _compared(self, run: Run, layout: Layout, one_process: Outcome, outcomes: list[Outcome]) -> Verdict:
        expected, actual = one_process.record, outcomes[0].record
        for outcome in outcomes:
            actual.replicas.update(outcome.record.replicas)
        first, worst = differences(expected, actual, self.tolerance)
        if first is None and actual.replicas:
            first = Difference(f"copies of {next(iter(actual.replicas))} differ")
        if first is not None:
            reason = likely_reason(self.module, layout, expected, outcomes[0])
            return Verdict(run, layout, first, worst, reason=reason)
        if self._has_loader and layout.data > 1:
            return self._on_its_loader(run, layout, worst)
        return Verdict(run, layout, worst=worst)

    def _on_its_loader(self, run: Run, layout: Layout, worst: dict[str, float]) -> Verdict:
        """Whether the job's own data gives a layout's data ranks together the samples that one process has."""
        by_rank = outcomes_of(run.devices, own_batches, self.job, run, timeout=self.timeout)
        told = first_told(by_rank)
        if told.error is not None:
            return Verdict(run, layout, worst=worst, error=f"on its own loader: {_raised(told)}")
        firsts = [by_rank[rank].batches for rank in range(0, run.devices, layout.tensor)]  # one of each tensor group
        for step, expected in enumerate(self.batches):
            shares = [batches[step] for batches in firsts if step < len(batches)]
            if sum(map(samples_of, shares)) != samples_of(expected):
                break  # the global batch grows with the data ranks, as under DDP: nothing to compare
            if not same_samples(expected, joined(shares)):
                first = Difference(f"step {step + 1}: the samples that all data ranks are given differ")
                return Verdict(run, layout, first, worst, reason=sampler_reason(layout))
        return Verdict(run, layout, worst=worst)

    def _reference(self, slices: int) -> Outcome:
        """One process, which decides overflow as ``slices`` data ranks.

        Raises:
            AssertionError: it does not train as one.
        """
        if slices not in self._references:
            outcome = outcomes_of(1, reference, self.job, self.batches, slices, timeout=self.timeout)[0]
            if slices == 1:
                _require_trained(outcome)
            if outcome.error is None:
                _require_steps(len(outcome.record.steps))
            self._references[slices] = outcome
        return self._references[slices]


def _require_trained(outcome: Outcome) -> Outcome:
    if outcome.error is not None:
        raise DoesNotTrain(f"the module does not train in one process: {outcome.error}\n{outcome.trace}")
    return outcome


def _require_steps(steps: int) -> None:
    if not steps:
        raise UserValueError(
            "the module takes no optimizer step on these batches, so there is nothing to compare; legal: as many "
            "batches as it takes for one step at least"
        )


def _raised(outcome: Outcome) -> str:
    inside = f" in {outcome.inside[-1]}" if outcome.inside else ""
    return f"raised{inside}: {outcome.error}"
