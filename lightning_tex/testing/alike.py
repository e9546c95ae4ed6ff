"""Whether a LightningModule trains on every layout as it does in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning import LightningModule

from lightning_tex.parallel.errors import UserError
from lightning_tex.parallel.topology import Layout
from lightning_tex.testing.batches import same_samples, samples_of, tensors_of
from lightning_tex.testing.layouts import Run, legal_layouts
from lightning_tex.testing.ranks import run_ranks
from lightning_tex.testing.reasons import likely_reason, relative_difference
from lightning_tex.testing.recording import Record
from lightning_tex.testing.runs import (
    BuildOptimizer,
    Job,
    Outcome,
    global_batches,
    on_layout,
    own_batches,
    reference,
    sgd,
)
from lightning_tex.testing.sliced_capacity import has_capacity

# Relative 2-norm per tensor that rounding alone does not reach in a few steps, by the Trainer's precision.
TOLERANCES = {"64-true": 1e-8, "32-true": 1e-4}


@dataclass(frozen=True)
class Difference:
    """A tensor or number that is not what one process has.

    Args:
        what: such as ``step 1: gradient of experts.up``.
        relative: the 2-norm of the difference over that of what is expected.
    """

    what: str
    relative: float

    def __str__(self) -> str:
        return f"{self.what} differs by {self.relative:.2g} of its 2-norm"


@dataclass(frozen=True)
class Verdict:
    """What came of one layout.

    Args:
        run: processes and arguments of the strategy.
        layout: sizes of all axes; ``None`` if it is not legal.
        first: the first difference in the order loss, gradient norm, gradients, and at the end parameters.
        worst: the largest difference by kind: ``loss``, ``gradient norm``, ``gradients``, ``parameters``.
        error: what was raised.
        reason: what is likely to be wrong.
        skipped: why it could not be tried.
    """

    run: Run
    layout: Layout | None = None
    first: Difference | None = None
    worst: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    reason: str | None = None
    skipped: str | None = None

    @property
    def alike(self) -> bool:
        """Whether the layout trains as one process does."""
        return self.first is None and self.error is None and self.skipped is None

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.run}: not tried: {self.skipped}"
        if self.alike:
            return f"{self.run}: alike, worst difference {max(self.worst.values(), default=0.0):.2g}"
        lines = [f"{self.run}: " + (self.error or str(self.first))]
        return "\n    likely: ".join([*lines, self.reason] if self.reason else lines)


def assert_trains_alike(
    module: LightningModule | Callable[[], LightningModule],
    data: Any = None,
    *,
    layouts: Iterable[Mapping[str, Any]] | None = None,
    steps: int = 3,
    precision: str = "64-true",
    tolerance: float | None = None,
    optimizer: BuildOptimizer | None = sgd,
    seed: int = 0,
    timeout: float = 120,
) -> None:
    """Assert that a module trains on every layout as in one process: losses, gradient norm, gradients, parameters.

    The first batches are taken from the data once, in one process; each data rank of a layout is given its slice. The
    reference is plain Lightning, ``strategy="auto"``. All runs are on CPU, each layout on forked processes.

    Args:
        module: a LightningModule that is not sharded yet, or a function that builds one.
        data: a LightningDataModule, a loader or another iterable of global batches; ``None``: the module's own loader.
        layouts: such as ``{"devices": 4, "tensor_parallel_size": 2}``, with any argument of TexMoEStrategy; ``None``:
            every legal layout of 1, 2 and 4 processes.
        steps: optimizer steps.
        precision: the Trainer's; in ``"64-true"`` rounding cannot be mistaken for an error.
        tolerance: relative 2-norm per tensor; ``None``: by precision, see :data:`TOLERANCES`.
        optimizer: over the parameters; by default SGD, as Adam hides wrong scales. ``None``: ``configure_optimizers``.
        seed: of everything.
        timeout: seconds after which a layout counts as hanging.

    Raises:
        AssertionError: with every layout that differs: the first tensor, by how much, and the likely reason.
    """
    verdicts = compare_layouts(
        _builder(module, data), layouts, steps=steps, precision=precision, tolerance=tolerance, optimizer=optimizer,
        seed=seed, timeout=timeout,
    )  # fmt: skip
    failed = [verdict for verdict in verdicts if not verdict.alike]
    if failed:
        told = "\n".join(f"  {verdict}" for verdict in failed)
        raise AssertionError(f"{len(failed)} of {len(verdicts)} layouts do not train as one process does:\n{told}")


def compare_layouts(
    build: Callable[[], tuple[LightningModule, Any]],
    layouts: Iterable[Mapping[str, Any]] | None = None,
    *,
    devices: Sequence[int] = (1, 2, 4),
    strategy: Mapping[str, Any] | None = None,
    steps: int = 3,
    precision: str = "64-true",
    tolerance: float | None = None,
    optimizer: BuildOptimizer | None = sgd,
    seed: int = 0,
    timeout: float = 120,
    progress: Callable[[Verdict], None] = lambda verdict: None,
) -> list[Verdict]:
    """Train on every layout and in one process, and compare; see :func:`assert_trains_alike`.

    Args:
        build: makes the module and its data anew.
        layouts: ``None``: every legal one of ``devices`` processes, with the arguments ``strategy`` besides.
        progress: is told of each verdict when it is there.
    """
    if precision not in TOLERANCES and tolerance is None:
        raise ValueError(f"precision={precision!r} needs a tolerance; without one: {', '.join(map(repr, TOLERANCES))}")
    comparison = _Comparison(Job(build, steps, precision, optimizer, seed), tolerance or TOLERANCES[precision], timeout)
    verdicts = []
    for run in (
        legal_layouts(comparison.module, devices, **(strategy or {})) if layouts is None else map(Run.of, layouts)
    ):
        verdicts.append(comparison.verdict(run))
        progress(verdicts[-1])
    return verdicts


class _Comparison:
    """The references of one job, and the verdict on each layout."""

    def __init__(self, job: Job, tolerance: float, timeout: float) -> None:
        self.job, self.tolerance, self.timeout = job, tolerance, timeout
        module, data = job.build()
        self.module = deepcopy(module)  # to look at: each process configures its own
        self.module.configure_model()
        self._own_loader = data is None or hasattr(data, "train_dataloader")
        self.batches = run_ranks(1, global_batches, job, timeout=timeout)[0][: job.steps]
        self._references: dict[int, Record] = {}

    def verdict(self, run: Run) -> Verdict:
        """Train on a layout and compare."""
        try:
            layout = run.resolve(self.module)
        except UserError as error:
            return Verdict(run, error=f"not legal: {error}")
        samples = samples_of(self.batches[0]) if self.batches else 0
        if samples % layout.data:
            return Verdict(run, layout, skipped=f"a batch of {samples} samples for {layout.data} data ranks")
        expected = self._reference(layout.data if has_capacity(self.module) else 1)
        try:
            outcomes = run_ranks(run.devices, on_layout, self.job, self.batches, run, timeout=self.timeout)
        except AssertionError as hung:
            return Verdict(run, layout, error=f"ranks hang: {str(hung).splitlines()[-1]}")
        told = _first_told(outcomes)
        if told.error is not None:
            cause = likely_reason(self.module, layout, expected, told)
            inside = f" in {told.inside[-1]}" if told.inside else ""
            return Verdict(run, layout, error=f"raised{inside}: {told.error}", reason=cause)
        for outcome in outcomes:
            outcomes[0].record.replicas.update(outcome.record.replicas)
        first, worst = differences(expected, outcomes[0].record, self.tolerance)
        if first is None and outcomes[0].record.replicas:
            first = Difference(f"copies of {next(iter(outcomes[0].record.replicas))}", float("nan"))
        if first is None and self._own_loader and layout.data > 1:
            first = self._own_data(run, layout)
            if first is not None:
                return Verdict(run, layout, first, worst, reason=first_sampler_reason(layout))
        reason = None if first is None else likely_reason(self.module, layout, expected, outcomes[0])
        return Verdict(run, layout, first, worst, reason=reason)

    def _reference(self, slices: int) -> Record:
        if slices not in self._references:
            outcome = run_ranks(1, reference, self.job, self.batches, slices, timeout=self.timeout)[0]
            if outcome.error is not None:
                raise AssertionError(f"the module does not train in one process: {outcome.error}\n{outcome.trace}")
            self._references[slices] = outcome.record
        return self._references[slices]

    def _own_data(self, run: Run, layout: Layout) -> Difference | None:
        """Whether the job's own data gives a layout's data ranks together the samples that one process sees."""
        by_rank = run_ranks(run.devices, own_batches, self.job, run, timeout=self.timeout)
        firsts = [by_rank[rank] for rank in range(0, run.devices, layout.tensor)]  # a rank of each tensor group
        for step, expected in enumerate(self.batches):
            shares = [batches[step] for batches in firsts if step < len(batches)]
            if sum(map(samples_of, shares)) != samples_of(expected):
                return None  # the global batch grows with the data ranks, as under DDP: nothing to compare
            if not same_samples(expected, _joined(shares)):
                return Difference(f"step {step + 1}: the samples that all data ranks are given", float("nan"))
        return None


def first_sampler_reason(layout: Layout) -> str:
    """What is likely when samples differ."""
    return (
        f"a sampler that does not share samples over the {layout.data} data ranks, or shuffles by rank; legal: "
        "DistributedSampler(.., **trainer.distributed_sampler_kwargs), or none, so that Lightning adds one"
    )


def _joined(shares: list[Any]) -> Any:
    columns = zip(*map(tensors_of, shares), strict=True)
    return [torch.cat(column) if column[0].dim() else column[0] for column in columns]


def _first_told(outcomes: list[Outcome]) -> Outcome:
    """The outcome of the rank whose error is a cause and no consequence."""
    return min(outcomes, key=lambda outcome: (outcome.error is None, outcome.follows))


def differences(expected: Record, found: Record, tolerance: float) -> tuple[Difference | None, dict[str, float]]:
    """The first difference above the tolerance, and the largest of each kind."""
    first: Difference | None = None
    worst: dict[str, float] = {}

    def compare(kind: str, what: str, one: torch.Tensor, other: torch.Tensor) -> None:
        nonlocal first
        relative = relative_difference(one, other)
        worst[kind] = max(worst.get(kind, 0.0), relative)
        if first is None and not relative <= tolerance:
            first = Difference(what, relative)

    if len(expected.steps) != len(found.steps):
        first = Difference(
            f"number of steps: {len(found.steps)}, in one process {len(expected.steps)}; it", float("nan")
        )
    for number, (one, other) in enumerate(zip(expected.steps, found.steps, strict=False), 1):
        compare("loss", f"step {number}: loss", _number(one.loss), _number(other.loss))
        for name, gradient in one.gradients.items():
            compare("gradients", f"step {number}: gradient of {name}", gradient, other.gradients[name])
        norms = _number(one.gradient_norm), _number(other.gradient_norm)
        compare("gradient norm", f"step {number}: gradient norm", *norms)
    for name, parameter in expected.parameters.items():
        compare("parameters", f"parameter {name} after the last step", parameter, found.parameters[name])
    return first, worst


def _number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _builder(
    module: LightningModule | Callable[[], LightningModule], data: Any
) -> Callable[[], tuple[LightningModule, Any]]:
    if isinstance(module, LightningModule):
        return lambda: (module, data)
    return lambda: (module(), data)
