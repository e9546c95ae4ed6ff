"""Time of all-to-alls beside the experts' products, and which layouts take chunks by themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_tex.models import DecoderConfig
from lightning_tex.parallel.expert_chunks import chunks_on
from lightning_tex.parallel.layout import Communication, Layout
from lightning_tex.planner.cluster import CLUSTERS, Cluster
from lightning_tex.planner.describe import describe_decoder
from lightning_tex.planner.layouts import Candidate, Choices, Job, candidates
from lightning_tex.planner.step_time import StepTime, step_time

# One MoE layer, whose backward has no recomputation; 16 nodes of 8.
CONFIG = DecoderConfig(1000, 1024, 2, 8, num_experts=64, top_k=2, capacity_factor=1.0)
JOB = Job(describe_decoder(CONFIG), 128, 2048, 128, "bf16-mixed")
LAYOUT = Layout(128, 1, 64, 1)
EXCHANGE = "all_to_all", "expert"


def timed(network: float, chunks: int, recompute: str | None = None, overlap: float = 1.0) -> StepTime:
    cluster: Cluster = replace(
        CLUSTERS["h100"], network_bandwidth=network, link_bandwidth=1e15, network_latency=1e-12, link_latency=1e-12,
        overlap=overlap,
    )  # fmt: skip
    communication = Communication(expert_chunks=chunks)
    candidate = Candidate(LAYOUT, 1, 1, 1, recompute, communication=communication)  # type: ignore[arg-type]
    return step_time(JOB, candidate, cluster)


@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize("recompute", [None, "full"])
def test_where_products_last_longer_all_but_a_chunk_is_hidden(chunks: int, recompute: str | None) -> None:
    whole, chunked = (timed(1e14, n, recompute) for n in (1, chunks))
    assert chunked.communication[EXCHANGE] == pytest.approx(whole.communication[EXCHANGE] / chunks, rel=1e-3)
    assert whole.total - chunked.total == pytest.approx(
        whole.communication[EXCHANGE] - chunked.communication[EXCHANGE], rel=1e-6
    )


def test_where_links_are_slow_the_experts_products_are_hidden() -> None:
    shares = []
    for network in (1e6, 1e7):
        whole, chunked = timed(network, 1), timed(network, 2)
        shares.append(whole.total - chunked.total)
    # The products of one layer, three times a forward's, whatever the network.
    assert shares[0] == pytest.approx(shares[1], rel=1e-3)
    assert 0 < shares[0] < whole.forward + whole.backward
    taken = timed(1e6, 1, overlap=0.5).total - timed(1e6, 2, overlap=0.5).total
    assert taken == pytest.approx(shares[0] / 2, rel=1e-3)


def test_auto_takes_chunks_where_the_expert_axis_leaves_nodes() -> None:
    inside, outside = Layout(16, 1, 8, 1), Layout(16, 1, 16, 1)
    assert [chunks_on(layout, "auto", 8) for layout in (inside, outside)] == [1, 2]
    assert [chunks_on(layout, 3, 8) for layout in (inside, outside)] == [3, 3]
    # Folded, it runs through tensor ranks; else it steps over them.
    assert [chunks_on(Layout(16, 4, 4, expert_tensor), "auto", 8) for expert_tensor in (1, 4)] == [1, 2]
    job = replace(JOB, world=16)
    for each in candidates(job, Choices(tensor=1, ranks_per_node=8)):
        assert each.communication.expert_chunks == (2 if each.layout.expert > 8 else 1)
    assert {c.communication.expert_chunks for c in candidates(job, Choices(tensor=1))} == {1}
