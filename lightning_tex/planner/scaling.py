"""How memory, bytes and time of a rank grow with ranks, experts and base size, and where each axis stops paying."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lightning_tex.planner.cluster import Cluster
from lightning_tex.planner.collective import sent_bytes
from lightning_tex.planner.describe import describe_decoder
from lightning_tex.planner.largest_base import GPT3, decoder_config, resized
from lightning_tex.planner.layouts import Choices, Job
from lightning_tex.planner.search import Planned, plan_all
from lightning_tex.planner.traffic import step_collectives

RANKS = tuple(1 << i for i in range(3, 15))  # 8 to 16,384
EXPERTS = tuple(1 << i for i in range(2, 9))
# An axis pays up to the size after which this share of speed is not gained any more.
WORTH = 0.05


@dataclass(frozen=True)
class Point:
    """The way to run one job that is taken of all.

    Args:
        at: what varies: ranks, experts, width, or an axis's size.
        job: what is run.
        planned: how; the fastest that fits or, if none does, the one that needs least.
        sent: bytes that a rank sends in a step, by axis.
    """

    at: int
    job: Job
    planned: Planned
    sent: dict[str, float]

    @property
    def tokens_per_second(self) -> float:
        """Of one rank."""
        return self.planned.time.tokens_per_second / self.job.world


def by_ranks(job: Job, cluster: Cluster, choices: Choices, ranks: Iterable[int] = RANKS) -> list[Point]:
    """Weak scaling: the model stays, every rank has the same number of sequences of a step."""
    share = max(1, job.global_batch_size // job.world)
    return _points(
        ((world, replace(job, world=world, global_batch_size=share * world)) for world in ranks), cluster, choices
    )


def by_experts(job: Job, cluster: Cluster, choices: Choices, experts: Iterable[int] = EXPERTS) -> list[Point]:
    """More experts in each layer, on as many ranks."""
    config = decoder_config(job)
    models = ((n, describe_decoder(replace(config, num_experts=n))) for n in experts)
    return _points(((n, replace(job, model=model)) for n, model in models), cluster, choices)


def by_width(job: Job, cluster: Cluster, choices: Choices) -> list[Point]:
    """The base models of the GPT-3 family, with the job's experts, on as many ranks."""
    config = decoder_config(job)
    models = [(w, resized(config, w, layers, max(w // 128, 8))) for layers, w in GPT3 if w >= 1024]
    return _points(((width, replace(job, model=describe_decoder(one))) for width, one in models), cluster, choices)


def by_axis(job: Job, cluster: Cluster, choices: Choices, axis: str) -> list[Point]:
    """The job with every size of the ``tensor`` or ``expert`` axis, everything else at its best."""
    sizes = [1 << i for i in range(job.world.bit_length())]
    found = []
    for size in sizes:
        one = replace(choices, **{axis: size})  # type: ignore[arg-type]
        found += _points([(size, job)], cluster, one)
    return found


def pays_up_to(points: list[Point]) -> int | None:
    """The smallest size of an axis that fits and is within :data:`WORTH` of the best speed; ``None`` if none fits."""
    fitting = [point for point in points if point.planned.fits]
    best = max((point.tokens_per_second for point in fitting), default=0.0)
    return next((point.at for point in fitting if point.tokens_per_second >= (1 - WORTH) * best), None)


def _points(jobs: Iterable[tuple[int, Job]], cluster: Cluster, choices: Choices) -> list[Point]:
    found = []
    for at, job in jobs:
        try:
            plans = plan_all(job, cluster, choices)
        except ValueError:  # no layout of that many ranks, or with an axis of that size
            continue
        best = plans.recommended or plans.nearest(1)[0]
        sent: dict[str, float] = {}
        for kind, count in sent_bytes(step_collectives(job, best.candidate)).items():
            sent[kind.axis] = sent.get(kind.axis, 0.0) + float(count)
        found.append(Point(at, job, best, sent))
    return found
