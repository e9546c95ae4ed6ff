"""Of all ways to run a job, the one to take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lightning_tex.planner.cluster import Cluster
from lightning_tex.planner.layouts import Candidate, Choices, Job, candidates
from lightning_tex.planner.memory import Memory, activation_source, memory
from lightning_tex.planner.states import FlatBuffers
from lightning_tex.planner.step_time import StepTime, step_time

# Formats of states that give the same numbers.
EXACT = ("fp32", "split")
# Of a foreseen peak, so much it may be wrong (docs/planner.md, "How far it is right").
PEAK_ERROR = 0.05


@dataclass(frozen=True)
class Planned:
    """A candidate with what is foreseen of it.

    Args:
        fits: the peak fits.
        roomy: it does so even where it is as much larger as a foreseen peak may be wrong.
    """

    candidate: Candidate
    memory: Memory
    time: StepTime
    fits: bool
    roomy: bool


def plan(job: Job, candidate: Candidate, cluster: Cluster) -> Planned:
    """Foresee memory and time of one candidate."""
    flat = FlatBuffers.of(job, candidate)
    needed = memory(job, candidate, cluster.device, flat=flat)
    return _planned(candidate, needed, step_time(job, candidate, cluster, flat), cluster)


def _planned(candidate: Candidate, needed: Memory, time: StepTime, cluster: Cluster) -> Planned:
    usable = cluster.usable_bytes
    return Planned(candidate, needed, time, needed.peak <= usable, (1 + PEAK_ERROR) * needed.peak <= usable)


def _preference(planned: Planned) -> tuple[bool, bool, float]:
    return not planned.fits, not planned.roomy, planned.time.total


@dataclass(frozen=True)
class Recommendation:
    """The layout to take, and why that one.

    Args:
        planned: the layout.
        reason: in words.
    """

    planned: Planned
    reason: str


@dataclass(frozen=True)
class Plans:
    """All candidates of a job, the ones that fit first, each kind by speed.

    Args:
        found: of each layout and set of strategy's arguments, the fastest micro-batch that fits, with room for what
            peaks may be wrong if one does; if none fits, the one that needs least.
        considered: how many candidates there were.
        left_out: of the candidates so many were not looked at: others that fit were found before.
    """

    found: list[Planned]
    considered: int
    left_out: int = 0

    @property
    def fitting(self) -> list[Planned]:
        return [each for each in self.found if each.fits]

    @property
    def recommended(self) -> Planned | None:
        """The layout to take; ``None`` if nothing fits."""
        return self.recommendation.planned if self.recommendation else None

    @property
    def recommendation(self) -> Recommendation | None:
        """The fastest that fits with room for what peaks may be wrong; ``None`` if nothing fits.

        What leaves less room, and states that are rounded at random or kept in 8 bits, only if nothing else fits. Of
        those within one percent of the fastest, the one that leaves most memory free.
        """
        if not (fitting := self.fitting):
            return None
        reason = f"the fastest with {PEAK_ERROR:.0%} of its peak to spare, by which peaks may be wrong"
        if roomy := [each for each in fitting if each.roomy]:
            fitting = roomy
        else:
            reason = f"the fastest; none has {PEAK_ERROR:.0%} of its peak to spare, by which peaks may be wrong"
        if exact := [each for each in fitting if each.candidate.optimizer_state_format in EXACT]:
            if len(exact) < len(fitting):
                reason += f", and whose states are exact ({', '.join(EXACT)})"
            fitting = exact
        best = min(each.time.total for each in fitting)
        equal = [each for each in fitting if each.time.total <= 1.01 * best]
        chosen = min(equal, key=lambda each: each.memory.peak)
        if chosen.time.total > best:
            reason += "; of those within 1 % of it, the one that needs least"
        return Recommendation(chosen, reason)

    def nearest(self, count: int) -> list[Planned]:
        """Those that need least memory."""
        return sorted(self.found, key=lambda each: each.memory.peak)[:count]


def plan_all(
    job: Job,
    cluster: Cluster,
    choices: Choices | None = None,
    wanted: int = 12,
    first: Callable[[Candidate], Any] = lambda candidate: 0,
) -> Plans:
    """Foresee all candidates of a job.

    Time is worked out for candidates that fit, and for one of each other group. Where activations are costly to know
    (traced), candidates are looked at one after another until so many groups fit: those with exact states first, and of
    these the fastest.

    Args:
        job, cluster, choices: what is planned.
        wanted: groups to find, where activations are costly.
        first: what candidates are ordered by before time, where activations are costly.

    Raises:
        ValueError: nothing is legal.
    """
    if activation_source(job).costly:
        return _best_first(job, cluster, choices, wanted, first)
    search, considered = _Search(job, cluster), 0
    for candidate in candidates(job, choices):
        considered += 1
        search.look_at(candidate)
    return Plans(search.found(), considered)


def _best_first(
    job: Job, cluster: Cluster, choices: Choices | None, wanted: int, first: Callable[[Candidate], Any]
) -> Plans:
    timed = [(step_time(job, candidate, cluster), candidate) for candidate in candidates(job, choices)]
    # What is recommended only if nothing else fits is looked at when the rest has been.
    timed.sort(key=lambda pair: (first(pair[1]), pair[1].optimizer_state_format not in EXACT, pair[0].total))
    search, looked_at = _Search(job, cluster), 0
    for _, candidate in timed:
        if len(search.best) >= wanted:
            break
        looked_at += 1
        if _group(candidate) not in search.best:
            search.look_at(candidate)
    return Plans(search.found(), len(timed), len(timed) - looked_at)


def _group(candidate: Candidate) -> Candidate:
    """What a candidate has in common with those of other micro-batches."""
    return replace(candidate, micro_batch=0, accumulation=0)


class _Search:
    """The best candidate of each group that fits, and of the others the one that needs least."""

    def __init__(self, job: Job, cluster: Cluster) -> None:
        self.job, self.cluster = job, cluster
        self.best: dict[Candidate, Planned] = {}
        self.least: dict[Candidate, tuple[Candidate, Memory]] = {}

    def look_at(self, candidate: Candidate) -> None:
        """Foresee one more."""
        job, cluster, group = self.job, self.cluster, _group(candidate)
        flat = FlatBuffers.of(job, candidate)
        needed = memory(job, candidate, cluster.device, flat=flat, enough=cluster.usable_bytes)
        if needed.peak <= cluster.usable_bytes:
            time = step_time(job, candidate, cluster, flat)
            found = _planned(candidate, needed, time, cluster)
            if group not in self.best or _preference(found) < _preference(self.best[group]):
                self.best[group] = found
        elif group not in self.least or needed.peak < self.least[group][1].peak:
            self.least[group] = candidate, needed

    def found(self) -> list[Planned]:
        """One of each group: those that fit by speed, then the others by need."""
        rest = [
            _planned(candidate, needed, step_time(self.job, candidate, self.cluster), self.cluster)
            for group, (candidate, needed) in self.least.items()
            if group not in self.best
        ]
        fitting = sorted(self.best.values(), key=lambda planned: planned.time.total)
        return [*fitting, *sorted(rest, key=lambda planned: planned.memory.peak)]
