"""The planner's time and search against brute force."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_tex.models import DecoderConfig
from lightning_tex.parallel.layout import AXES, Layout
from lightning_tex.planner.cluster import CLUSTERS, Cluster
from lightning_tex.planner.collective import Collective
from lightning_tex.planner.describe import describe_decoder
from lightning_tex.planner.largest_base import base_parameters, family, largest_base
from lightning_tex.planner.layouts import Candidate, Choices, Job, candidates
from lightning_tex.planner.links import seconds, span
from lightning_tex.planner.memory import memory
from lightning_tex.planner.model import ModelDescription
from lightning_tex.planner.model_flops import model_flops
from lightning_tex.planner.search import PEAK_ERROR, plan, plan_all
from lightning_tex.planner.step_time import step_time
from lightning_tex.planner.work import computation

SMALL = DecoderConfig(1000, 256, 4, 4, num_experts=8, capacity_factor=1.0, activation="gelu")
H100 = CLUSTERS["h100"]


def small(**changed: object) -> ModelDescription:
    """SMALL with some sizes changed."""
    return describe_decoder(replace(SMALL, **changed))


@pytest.mark.parametrize("layout", [Layout(48, 4, 2, 4), Layout(48, 4, 6, 1), Layout(32, 2, 4, 2), Layout(24, 1, 8, 1)])
@pytest.mark.parametrize("per_node", [1, 4, 6, 64])
def test_spans_are_those_of_the_topologys_groups(layout: Layout, per_node: int) -> None:
    for axis in (*AXES, "world"):
        groups = [tuple(range(layout.world))] if axis == "world" else layout.groups(axis)
        found = span(layout, axis, per_node)
        leaving: Counter[int] = Counter()
        remote: Counter[int] = Counter()
        local = 0.0
        for group in groups:
            nodes = [rank // per_node for rank in group]
            for here, there in itertools.pairwise([*nodes, nodes[0]]):
                leaving[here] += here != there
            for node in nodes:
                elsewhere = sum(other != node for other in nodes) / max(1, len(group) - 1)
                remote[node] += elsewhere
                local = max(local, (len(group) > 1) - elsewhere)
        assert found.inside == (not any(leaving.values()))
        assert found.rings == max(leaving.values(), default=0)
        assert found.remote == pytest.approx(max(remote.values()))
        assert found.local == pytest.approx(local)


def test_a_collective_takes_the_slower_of_link_and_shared_network() -> None:
    cluster = replace(
        H100, gpus_per_node=4, link_bandwidth=100.0, network_bandwidth=80.0, link_latency=0, network_latency=0
    )
    inside, across = Layout(8, 4, 1, 4), Layout(8, 1, 8, 1)
    for operation, sent in (("all_gather", 300.0), ("reduce_scatter", 300.0), ("all_reduce", 600.0)):
        assert seconds(Collective(operation, "tensor", 4, "forward", 400), inside, cluster) == sent / 100
        # Two ranks of each of four data groups: four rings leave a node, with 200 bytes of 400 each (twice to sum).
        through = seconds(Collective(operation, "data", 2, "forward", 400), inside, cluster)
        assert through == pytest.approx((400 if operation == "all_reduce" else 200) * 4 / 80)
    # Four ranks of a node send 4/8 of 800 bytes to the other node: 1600 bytes through 80 a second.
    assert seconds(Collective("all_to_all", "expert", 8, "forward", 800), across, cluster) == pytest.approx(1600 / 80)
    assert seconds(Collective("all_to_all", "expert", 1, "forward", 800), across, cluster) == 0


def test_flops_are_twice_the_multiplications() -> None:
    job = Job(small(), 1, 64, 3, "32-true")
    tokens, d = 3 * 64, 256
    each = 4 * (4 * d * d + 2 * 64 * d) + 2 * 8 * d * d + 2 * (8 * d * d + 8 * d) + 1000 * d
    assert model_flops(job) == 3 * 2 * tokens * each
    # One rank computes that, but half the square of attention, with 5 products of it in a backward in place of 4; full
    # recomputation is one more forward of the blocks, which ends before the last product of those with experts.
    half = 2 * tokens * 4 * 64 * d
    alone = computation(job, Candidate(Layout(1), 3), H100).flops
    assert alone == model_flops(job) - 3 * half + half / 2
    again = computation(job, Candidate(Layout(1), 3, activation_checkpointing="full"), H100).flops
    last = 2 * 2 * tokens * 4 * d * d
    assert again == pytest.approx(alone + model_flops(job) / 3 - half - last - 2 * tokens * 1000 * d)


def test_work_is_shared_by_the_tensor_axis() -> None:
    whole = Job(small(num_experts=1), 1, 64, 8, "32-true")
    parts = replace(whole, world=8)
    for layout, sequences in ((Layout(8, 4, 1, 4), 4), (Layout(8, 1, 1, 1), 1)):
        flops = computation(parts, Candidate(layout, sequences), H100).flops
        assert 8 * flops == pytest.approx(computation(whole, Candidate(Layout(1), 8), H100).flops)


def test_a_measured_profile_slows_what_it_was_measured_of() -> None:
    shares = {"narrow_products": {256: 0.5, 1024: 0.9}, "link_shares": {"all_gather": 0.5}}
    slower = replace(H100, **shares, attention_efficiency=0.25, pass_bandwidth=H100.memory_bandwidth / 3)
    full = H100.peak("bf16-mixed") * H100.product_efficiency
    reached = [slower.product_flops("bf16-mixed", size) / full for size in (8, 256, 512, 1024, 2048, 4096)]
    assert reached == pytest.approx([0.5, 0.5, 0.7, 0.9, 1.0, 1.0])
    assert slower.attention_flops("bf16-mixed") == pytest.approx(full / 4)
    assert slower.passes(6e9) == pytest.approx(3 * H100.passes(6e9))
    gather, reduction = (Collective(kind, "tensor", 4, "forward", 1 << 30) for kind in ("all_gather", "all_reduce"))
    plain, now = (
        [seconds(each, Layout(8, 4), replace(of, link_latency=0)) for each in (gather, reduction)]
        for of in (H100, slower)
    )
    assert now == pytest.approx([2 * plain[0], plain[1]])


def test_what_overlaps_is_hidden_by_the_measured_share() -> None:
    job, candidate = Job(small(), 8, 64, 16), Candidate(Layout(8, 2, 2, 2), 4)
    whole, half = (step_time(job, candidate, replace(H100, overlap=share)) for share in (1.0, 0.5))
    assert 0 < half.hidden == pytest.approx(whole.hidden / 2)
    assert half.total == pytest.approx(whole.total + whole.hidden / 2)


def test_gradients_leave_beside_what_is_left_of_the_backward() -> None:
    job, candidate = Job(small(num_layers=12), 8, 64, 16), Candidate(Layout(8, 1, 1), 2)
    compute = computation(job, candidate, H100)
    fast, slow = (replace(H100, link_bandwidth=H100.link_bandwidth * by, link_latency=0) for by in (1e3, 1e-6))
    quick, late = (step_time(job, candidate, cluster) for cluster in (fast, slow))
    # A quick network hides all but what is complete last; a slow one sends for as long as the backward lasts.
    hideable = quick.reduction + min(quick.collection, quick.optimizer)
    assert quick.reduction + quick.collection > quick.hidden > 0.6 * hideable
    assert (
        compute.backward - compute.backward_of_parts[-1]
        <= late.hidden + 1e-9
        <= compute.backward + quick.optimizer + compute.forward + 2e-9
    )
    parts = compute.backward_of_parts
    assert sum(parts) == pytest.approx(compute.backward) and len(parts) == 2 + 2 * 12 and parts[0] == 0  # the embedding
    assert min(parts[1:]) > 0


@given(st.data())
def test_what_a_layout_needs_and_takes_adds_up(data: st.DataObject) -> None:
    job = Job(small(), 8, 64, 16)
    found = plan(job, data.draw(st.sampled_from(list(candidates(job)))), H100)
    assert sum(found.memory.parts().values()) == found.memory.peak
    assert sum(found.time.parts().values()) == pytest.approx(found.time.total)
    assert 0 < found.time.mfu < 1 and found.time.hidden <= found.time.reduction + found.time.collection
    assert found.candidate.micro_batch * found.candidate.accumulation * found.candidate.layout.data == 16


@pytest.mark.full
def test_the_recommended_one_has_room_and_is_as_fast_as_any_exact_one_that_has() -> None:
    job = Job(small(dim=2048, num_heads=16, num_layers=8), 16, 1024, 32)
    tight = replace(H100, memory_bytes=2e9, reserved_bytes=0)
    plans = plan_all(job, tight)
    best = plans.recommended
    assert best is not None and (1 + PEAK_ERROR) * best.memory.peak <= 2e9
    everything = [
        plan(job, candidate, tight) for candidate in candidates(job, Choices(optimizer_state_format=("fp32", "split")))
    ]
    assert plans.considered == 2 * len(everything)
    fastest = min(each.time.total for each in everything if (1 + PEAK_ERROR) * each.memory.peak <= 2e9)
    assert fastest <= best.time.total <= 1.01 * fastest
    assert any(not each.fits for each in plans.found)
    assert plan_all(job, replace(tight, memory_bytes=1e6)).recommended is None


@pytest.mark.full
def test_the_largest_base_model_fits_and_the_next_does_not() -> None:
    job = Job(small(vocab_size=51200), 16, 512, 16)
    tight = replace(H100, memory_bytes=4e9, reserved_bytes=0)
    choices = Choices(tensor=4, optimizer_state_format=("fp32",))
    largest = largest_base(job, tight, choices)
    assert largest is not None and largest.planned.memory.peak <= 4e9
    models = family(job.model.config)
    sizes = [base_parameters(model) for model in models]
    assert sizes == sorted(sizes)
    following = models[models.index(largest.config) + 1]
    larger = replace(job, model=describe_decoder(following))
    assert min(memory(larger, candidate).peak for candidate in candidates(larger, choices)) > 4e9


@pytest.mark.full
def test_planning_for_16384_ranks_is_a_matter_of_seconds() -> None:
    job = Job(small(vocab_size=51200, dim=4096, num_layers=32, num_heads=32, num_experts=16), 16384, 2048, 16384)
    plans = plan_all(job, H100, Choices(zero_stage=(0, 1), optimizer_state_format=("fp32",)))
    assert plans.considered > 1000 and plans.recommended is not None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"memory_bytes": -1}, ("memory_bytes", "positive")),
        ({"product_efficiency": 1.2}, ("product_efficiency", "at most 1")),
        ({"overlap": 1.2}, ("overlap", "at most 1")),
        ({"link_shares": {"all_to_all": 2}}, ("link_shares", "at most 1")),
        ({"network_shares": {"alltoall": 0.5}}, ("network_shares", "'alltoall'", "all_to_all")),
        ({"narrow_products": "none"}, ("narrow_products", "shares")),
        ({"narrow_products": {0: 0.5}}, ("narrow_products", "1 or more")),
        ({"device": "tpu"}, ("device", "cuda")),
        ({"link_bandwidth": "fast"}, ("link_bandwidth", "number")),
        ({"colour": 1}, ("unknown", "colour")),
    ],
)
def test_a_wrong_cluster_file_is_refused_by_name(tmp_path, changed, words) -> None:
    path = tmp_path / "own.yaml"
    H100.write(path)
    assert Cluster.named(str(path)) == H100
    path.write_text(path.read_text() + "".join(f"\n{key}: {value}" for key, value in changed.items()))
    with pytest.raises(ValueError, match=words[0]) as caught:
        Cluster.named(str(path))
    assert all(word in str(caught.value) for word in words)
