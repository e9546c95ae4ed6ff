"""Time of all-to-alls that run beside the experts' products, where a MoE layer's tokens travel in chunks."""

from __future__ import annotations

from lightning_tex.planner.cluster import Cluster
from lightning_tex.planner.collective import BACKWARD, FORWARD, RECOMPUTED
from lightning_tex.planner.layers import Moe
from lightning_tex.planner.layouts import Candidate, Job
from lightning_tex.planner.links import seconds
from lightning_tex.planner.micro_step import MicroStep
from lightning_tex.planner.traffic import MicroStepTraffic
from lightning_tex.planner.work import Work


def hidden_exchange(job: Job, candidate: Candidate, cluster: Cluster) -> float:
    """Seconds of one micro-step's all-to-alls over the expert axis that computation does not wait for.

    Of c chunks all but the first can come, and all but the last go home, while others are computed: (c - 1) / c of the
    exchange, as far as the products last. In the backward these are twice the forward's.
    """
    step = MicroStep(job, candidate)
    if step.chunks == 1:
        return 0.0
    work, traffic, hidden = Work(step), MicroStepTraffic(step), 0.0
    for placed, times in job.model.layer_counts.items():
        layer = placed.layer
        if not isinstance(layer, Moe):
            continue
        chunks = len(step.sent_rows(layer))
        products = sum(
            product.seconds(cluster, job.precision, step.element_bytes)
            for product in work.products(layer)
            if not product.full_precision  # the router's
        )
        exchange = {FORWARD: 0.0, RECOMPUTED: 0.0, BACKWARD: 0.0}
        for each in traffic.layer(placed):
            if each.operation == "all_to_all" and not each.counted_as:
                exchange[each.during] += each.times * seconds(each, candidate.layout, cluster)
        for during, taken in exchange.items():
            beside = products * (2 if during == BACKWARD else 1)
            hidden += times * min(taken * (chunks - 1) / chunks, beside)
    return hidden
