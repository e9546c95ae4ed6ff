"""``benchmarks/gpu.sh``: parts within their budgets, files, and the tables that are made of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gpu_parts
import gpu_step
import gpu_tables
import pytest

from lightning_tex.testing.ranks import run_ranks


def part(code: str, budget: float = 60) -> gpu_parts.Part:
    return gpu_parts.Part([sys.executable, "-c", code], (budget, []), (budget, []), [])


def test_a_part_writes_what_it_printed_last_and_nothing_where_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_parts, "GRACE", 0)
    older = tmp_path / "late.json"
    older.write_text("older")
    parts = {
        "well": part("print('a table'); print('{\"figure\": 3}')"),
        "wrong": part("print('{}'); raise SystemExit(3)"),
        "silent": part("print('no object')"),
        "skipped": part("print('skipped: no GPU')"),
        "late": part("import time; time.sleep(60)", budget=1),
        "tests": part("print('FAILED a.py::b - why'); print('1 failed, 2 passed in 0.1s'); raise SystemExit(1)"),
    }
    ended = {name: gpu_parts.run(name, one, "full", tmp_path) for name, one in parts.items()}
    assert ended == {"well": True, "wrong": False, "silent": False, "skipped": True, "late": False, "tests": False}
    record = json.loads((tmp_path / "well.json").read_text())
    assert record["report"] == {"figure": 3} and record["part"] == "well" and record["size"] == "full"
    assert {"device", "torch", "date", "seconds"} <= record.keys()
    assert json.loads((tmp_path / "tests.json").read_text())["report"] == {
        "counts": {"failed": 1, "passed": 2},
        "failures": ["a.py::b"],
    }
    assert older.read_text() == "older" and not (tmp_path / "wrong.json").exists()
    assert "exit code 3" in capfd.readouterr().out


def test_budgets_fit_what_the_script_says() -> None:
    assert sum(part.budget("full") for part in gpu_parts.PARTS.values()) <= 10 * 60
    page = gpu_tables.PAGE.read_text()
    assert all(f"<!-- {name} -->" in page and f"<!-- /{name} -->" in page for name in gpu_parts.PARTS)


def layer_report() -> dict[str, Any]:
    import torch

    from lightning_tex.bench import layer
    from lightning_tex.bench.layer_shapes import Shape

    plan = layer.Plan(
        [Shape("small", 32, 16, 8, 2)], ["zipf"], [torch.float32], [False], 64, torch.device("cpu"), turns=1, repeat=1
    )
    return {**layer.conditions(plan), "cases": list(layer.cases(plan))}


STEP: dict[str, Any] = {
    "parameters": 6.92e9,
    "precision": "bf16-mixed",
    "tokens": 16384,
    "sequence_length": 4096,
    "tokens_per_second_of_a_device": 23600.4,
    "step_ms": 694.2,
    "step_ms_by_part": 700.0,
    "flops_per_second": 2e14,
    "mfu": 0.2,
    "peak_bytes": 100 << 30,
    "fitted": {
        "layers": 12,
        "of_layers": 16,
        "optimizer_state_format": "int8",
        "activation_checkpointing": None,
        "planned_bytes": 101 << 30,
    },
    "parts": {"MoE": {"ms": {"forward": 100.0, "backward": 250.0}, "total_ms": 350.0, "mfu": 0.3}},
}


def test_tables_are_made_of_the_files_and_stay_where_there_is_none(tmp_path: Path) -> None:
    conditions = {"size": "full", "device": "NVIDIA H200", "memory_gib": 139.8, "torch": "2.11", "date": "2026-11-28"}
    reports: dict[str, Any] = {
        "layer-mixtral": run_ranks(1, layer_report)[0],
        "step": STEP,
        "memory-int8": {"planned": 3 << 30, "allocated": 3 << 30},
        "checkpoint": {"megabytes": 100, "device": "cuda", "seconds": {"save": 0.5}},
        "tests": {"counts": {"passed": 90, "failed": 1}, "failures": ["a.py::b"]},
    }
    for name, report in reports.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({**conditions, "report": report}))
    page = gpu_tables.rewritten("<!-- optimizer -->\n\nolder\n\n<!-- /optimizer -->\n" + _empty(*reports), tmp_path)
    assert page.startswith("<!-- optimizer -->\n\nolder\n\n<!-- /optimizer -->\n")
    assert page.count("NVIDIA H200 (139.8 GiB), torch 2.11, 2026-11-28.") == len(reports)
    for words in (
        "| ours |", "| plain loop |", "**small** (D 32, H 16, 8 experts, top-2), 64 tokens, float32, zipf routing",
        "12 of 16 layers, 6.92B parameters", "**23,600 tokens/s**", "allocated at most 100.0 GiB, planned 101.0",
        "| MoE | 100.00 |  | 250.00 |  | 350.00 | 50.0 | 30.0 |",
        "planned 3.000 GiB, allocated 3.000 GiB: **1.000**", "| save | 500 | 200 |", "90 passed, 1 failed",
    ):  # fmt: skip
        assert words in page, words
    assert gpu_tables.rewritten(page, tmp_path) == page


def _empty(*parts: str) -> str:
    return "".join(f"<!-- {name} -->\n\n{gpu_tables.NOT_YET}\n\n<!-- /{name} -->\n" for name in parts)


def test_the_page_is_what_its_files_make_of_it() -> None:
    page = gpu_tables.PAGE.read_text()
    assert gpu_tables.rewritten(page, gpu_tables.RESULTS) == page, "python benchmarks/gpu_tables.py"


@pytest.mark.full
def test_of_a_model_as_much_is_trained_as_fits() -> None:
    recipe, layers = str(gpu_parts.HERE / "gpu_olmoe.yaml"), ["--model.init_args.config.num_layers", "3"]

    def planned(kept: int, way: gpu_step.Way) -> int:
        return gpu_step._planned(recipe, gpu_step._options(kept, way))

    whole = gpu_step.fitted(recipe, layers, 80 * 2**30)
    assert (whole["layers"], whole["optimizer_state_format"], whole["activation_checkpointing"]) == (3, "fp32", None)
    assert whole["planned_bytes"] == planned(3, gpu_step.WAYS[0])
    least, one = planned(3, gpu_step.WAYS[-1]), planned(1, gpu_step.CUT)
    assert one < least
    cut = gpu_step.fitted(recipe, layers, (one + least) / 2 / (1 - gpu_step.MARGIN))
    assert (cut["layers"], cut["of_layers"], cut["planned_bytes"]) == (1, 3, one)
    with pytest.raises(SystemExit, match="not one layer"):
        gpu_step.fitted(recipe, layers, 2**30)
