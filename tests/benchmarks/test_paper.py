"""``benchmarks/paper.py``: what the paper publishes, from its own formulas and from the planner's."""

from __future__ import annotations

import paper
import pytest


def test_the_papers_figures() -> None:
    gpt = paper.gpt_parameters(32, 4096, 51200, 2048, 16)
    assert round(gpt["non_expert"] / 1e9, 2) == 4.52 and round(sum(gpt.values()) / 1e9, 1) == 38.9
    assert gpt["expert"] == pytest.approx(34.37e9, rel=2e-4)
    for tensor, gigabytes in ((1, 30.3), (2, 17.0), (4, 10.3)):
        assert round(paper.states_bytes(gpt["non_expert"], gpt["expert"], 128, tensor, 16) / 1e9, 1) == gigabytes
    assert round(paper.base_ratio(128, 16, 4), 1) == 2.9 and round(paper.base_ratio(128, 16, 8), 1) == 4.3
    assert paper.paper_flops(1024, 2048, 32, 4096, 51200) == pytest.approx(1.197e17, rel=1e-3)


def test_the_papers_spike_is_between_four_and_six_bytes_an_element_and_flat_with_tiles() -> None:
    rows = paper._spike()
    papers = next(row for row in rows if row["experts"] == 32)
    assert papers["shard_elements"] == pytest.approx(0.895e9, rel=2e-3)
    low, high = papers["untiled_gb"]
    assert low < paper.PAPER_SPIKE_GB < high
    assert papers["own_untiled_gb"] == pytest.approx(low, rel=1e-3)
    assert rows[-1]["own_untiled_gb"] > 3.5 * low and max(row["own_tiled_gb"] for row in rows) <= 0.25 * 2**30 / 1e9


def test_simulated_savings_on_summit_are_the_models_own() -> None:
    for machine in paper._times()["machines"]:
        rows = machine["variants"]
        assert rows["baseline"]["time_saved"] == 0
        assert rows["+DTD +CAC"]["time_saved"] > max(rows["+DTD"]["time_saved"], rows["+CAC"]["time_saved"]) > 0.1
        by_part = {name: row["by_part"]["all_to_all over expert"] for name, row in rows.items()}
        # Two all-to-alls of rows each of forward and backward, and one of full recomputation, which ends before the way
        # back; weights, which travel too, are little.
        assert by_part["+CAC"] == pytest.approx(4 / 5 * by_part["baseline"], rel=1e-3)
        assert by_part["+DTD"] < 0.3 * by_part["baseline"]  # a share of four; latencies stay
