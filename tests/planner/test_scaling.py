"""Growth with ranks, experts, base size and axes, as ``lightning-tex plan --weak-scaling`` shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_tex.cli import main
from lightning_tex.planner import scaling


def test_weak_scaling(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling.by_ranks, "__defaults__", ((8, 64, 4096),))
    monkeypatch.setattr(scaling.by_experts, "__defaults__", ((4, 16),))
    monkeypatch.setattr(scaling, "GPT3", ((24, 1024), (32, 2560), (96, 12288)))
    sizes = "--dim 2048 --num-layers 24 --num-heads 16 --vocab-size 51200 --num-experts 8 --capacity-factor 1"
    kept = "--zero-stage 1 --activation-checkpointing full --optimizer-state-format fp32 --micro-batch 1"
    job = "--cluster a100-40gb --gpus 64 --global-batch-size 128 --sequence-length 1024"
    figure = tmp_path / "weak.png"
    main(["plan", *f"{sizes} {kept} {job}".split(), "--weak-scaling", "--json", "--plot", str(figure)])
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    series = report["series"]
    assert [p["at"] for p in series["ranks"]] == [8, 64, 4096]
    assert [p["accumulate_grad_batches"] * p["micro_batch"] for p in series["ranks"]] == [
        2 * p["tensor_parallel_size"] for p in series["ranks"]
    ], "every rank keeps its share of the batch"
    assert series["width"][-1]["peak_bytes"] > series["width"][0]["peak_bytes"]
    memory = {p["at"]: p["peak_bytes"] for p in series["tensor"]}
    assert memory[8] < memory[2] < memory[1]
    speeds = [p["tokens_per_second_of_a_rank"] for p in series["tensor"] if p["fits"]]
    chosen = next(p for p in series["tensor"] if p["at"] == report["pays_up_to"]["tensor"])
    assert chosen["fits"] and chosen["tokens_per_second_of_a_rank"] >= 0.95 * max(speeds)
    assert figure.stat().st_size > 20_000
