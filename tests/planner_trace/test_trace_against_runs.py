"""A trace against the run it is a trace of: bytes of state and bytes sent equal, the peak of a step close."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from helpers.small_runs import really, traced, write_recipe

from lightning_tex.testing.ranks import run_ranks

CAC = {"activation_checkpointing": "communication_aware"}


class Case(NamedTuple):
    world: int
    strategy: dict[str, Any] = {}
    precision: str = "32-true"
    capacity: float | None = None
    accumulate: int = 1
    sizes: dict[str, Any] = {}


def layout(tensor: int, expert: int, **more: Any) -> dict[str, Any]:
    return {"tensor_parallel_size": tensor, "expert_parallel_size": expert, **more}


FOLDED = {"expert_tensor_parallel_size": 1}
QUICK = {
    "TED, all of it replayed": Case(4, layout(2, 2, **CAC)),
    "capacity, recomputed, ZeRO 0": Case(
        2, layout(1, 2, activation_checkpointing="full", zero_stage=0), "32-true", 1.25
    ),
}
MORE = {
    "sequence, 8 bits, accumulated": Case(
        2, layout(2, 1, sequence_parallel=True, optimizer_state_format="int8"), "bf16-mixed", accumulate=2
    ),
    "own module": Case(2, layout(2, 1), "bf16-mixed", sizes={"model": "OwnModule"}),
    "own module, experts": Case(2, layout(1, 2), "16-mixed", sizes={"model": "OwnModule"}),
    "one process": Case(1),
    "16-mixed": Case(2, layout(2, 1), "16-mixed"),
    "TED": Case(4, layout(2, 2)),
    "without splitting": Case(4, layout(2, 2, duplicate_token_dropping=False, **CAC), capacity=1.0),
    "folding, ZeRO 2": Case(4, layout(2, 4, **FOLDED, sequence_parallel=True, zero_stage=2)),
    "folding, replayed": Case(4, layout(2, 2, **FOLDED, **CAC), capacity=0.75),
    "split states, ZeRO 2, accumulated": Case(
        4, layout(2, 2, optimizer_state_format="split", zero_stage=2), "bf16-mixed", accumulate=2
    ),
    "rounded states": Case(2, layout(2, 1, optimizer_state_format="stochastic"), "bf16-mixed", 1.25, 2),
    "sequence, capacity, replayed": Case(2, layout(2, 1, sequence_parallel=True, **CAC), "bf16-mixed", 1.25),
    "tensor 4": Case(4, layout(4, 1, **CAC), "bf16-mixed", sizes={"activation": "gelu", "tie_embeddings": False}),
    "64 bits": Case(2, layout(1, 2), "64-true"),
    "small tiles": Case(2, layout(1, 2, tile_size=4096), "bf16-mixed"),
    "8 ranks": Case(8, layout(2, 4, **CAC), "bf16-mixed"),
    "8 ranks, folding": Case(8, layout(4, 4, **FOLDED, sequence_parallel=True, zero_stage=2), "bf16-mixed"),
    "8 ranks, two replicas": Case(8, layout(2, 2, activation_checkpointing="full"), capacity=1.25),
}


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.full) for name in MORE)])
def test_a_trace_is_what_a_run_does(name, tmp_path):
    case = {**QUICK, **MORE}[name]
    path = write_recipe(tmp_path, capacity_factor=case.capacity, num_layers=2, **case.sizes)
    trainer = {"precision": case.precision, "accumulate_grad_batches": case.accumulate}
    runs = run_ranks(case.world, really, path, case.world, case.strategy, trainer)
    ranks = sorted({0, case.world - 1} if name in MORE else {case.world - 1})
    traces = run_ranks(1, every_trace, path, case.world, ranks, case.strategy, trainer)[0]
    for rank, trace in zip(ranks, traces, strict=True):
        run = runs[rank]
        assert trace.state_bytes == run["states"]
        # Whatever is alive between steps, states among it, and little else: metrics, random states, the last batch.
        assert 0 <= run["live"] - sum(trace.state_bytes.values()) < 30_000
        assert trace.sent_bytes == run["sent"]
        assert sum(trace.peak_bytes_by_kind.values()) == trace.peak_bytes
        print(f"{name}, rank {rank}: traced peak {trace.peak_bytes}, allocated {run['peak']}")
        assert trace.peak_bytes == pytest.approx(run["peak"], rel=0.05)


def every_trace(path, world, ranks, strategy, trainer):
    return [traced(path, world, rank, strategy, trainer) for rank in ranks]
