"""NCCL's flight recorder."""

from __future__ import annotations

from pathlib import Path

from lightning_tex.resilience.nccl import record_flights


def test_nccl_writes_into_the_runs_folder_unless_told_otherwise(tmp_path: Path) -> None:
    environment: dict[str, str] = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "10"}
    record_flights(tmp_path / "run", environment)
    assert environment == {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "10",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": f"{tmp_path}/run/nccl_trace_rank_",
    }
    assert (tmp_path / "run").is_dir()
