"""What Throughput logs: analytic FLOPs against those of the operations that ran, and the peak of known devices only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import pytest
import torch
from helpers.behaviour_modules import DictLogger, new_trainer
from helpers.ranks import together
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import lightning_tex as tex
from lightning_tex.callbacks import Throughput
from lightning_tex.models import DecoderConfig
from lightning_tex.planner.cluster import CLUSTERS, _profile_of
from lightning_tex.planner_trace.flops import operation_flops
from lightning_tex.strategy import training_flops

LENGTH, SEQUENCES, VOCABULARY = 16, 4, 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "dim": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "hidden_dim": 24,
    "num_experts": 4,
    "top_k": 2,
    "max_sequence_length": LENGTH,
}


class Counted(TorchDispatchMode):
    """FLOPs of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.flops += operation_flops(func, args, kwargs or {}, result)
        return result


class Model(tex.LanguageModel):
    """One that counts what its steps compute."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(DecoderConfig(**{**SIZES, **sizes}))
        self.counted = Counted()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.counted.__enter__()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.counted.__exit__(None, None, None)


class Own(L.LightningModule):
    """A module with matrices that no formula knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(VOCABULARY, 8), nn.Conv1d(8, 8, 1)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        return self.mix(self.embedding(batch["input_ids"]).mT).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: L.LightningModule, layout: dict[str, Any], **flags: Any) -> DictLogger:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (3 * SEQUENCES, LENGTH), generator=generator)
    samples = [{"input_ids": row, "labels": row} for row in ids]
    logger = DictLogger()
    trainer = new_trainer(layout, logger=logger, **{"log_every_n_steps": 1, "max_epochs": 1, **flags})
    trainer.fit(module, DataLoader(samples, batch_size=SEQUENCES))
    return logger


def of_the_step() -> tuple[dict[str, float], float]:
    module = Model()
    logged = dict(fit(module, {}).logged)
    return logged, module.counted.flops / (3 * SEQUENCES * LENGTH)


def halves(**flags: Any) -> dict[str, float]:
    return dict(fit(Model(), {"tensor_parallel_size": 2, **flags}).logged)


def others(flops_per_token: float | None) -> dict[str, float]:
    callback = Throughput(flops_per_token)
    return dict(fit(Own(), {}, callbacks=[callback]).logged)


def on_a_known_device() -> dict[str, float]:
    training_flops.Cluster.of_device = lambda _: CLUSTERS["h100"]  # type: ignore[method-assign,assignment]
    return dict(fit(Model(), {}, precision="bf16-mixed").logged)


def test_the_formulas_count_what_runs_and_nothing_twice() -> None:
    ((logged, counted),) = together(1, {"step": (of_the_step,)})["step"]
    # The CPU's attention computes its scores once more in the backward: 5 products where the formula has 4.
    again = 2 * LENGTH * 16 * 2
    assert logged["tflops_per_device"] / logged["tokens_per_second"] * 1e12 == pytest.approx(counted - again, rel=1e-5)
    assert "mfu" not in logged
    half, recomputed = together(
        2, {"half": (halves,), "again": (lambda: halves(activation_checkpointing="full"),)}
    ).values()
    for ranks in (half, recomputed):  # rank 0 logs
        each = ranks[0]["tflops_per_device"] / ranks[0]["tokens_per_second"] * 1e12
        assert each == pytest.approx((counted - again) / 2, rel=1e-5)


def test_mfu_is_of_the_data_sheet_and_only_of_devices_that_are_known() -> None:
    ((logged,),) = (together(1, {"known": (on_a_known_device,)})["known"],)
    assert logged["mfu"] == pytest.approx(logged["tflops_per_device"] / 989, rel=1e-5)
    known = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-80GB": "a100-80gb",
        "NVIDIA A100-PCIE-40GB": "a100-40gb",
        "Tesla V100-SXM2-16GB": "summit-v100-16gb",
        "NVIDIA H100 PCIe": None,
        "NVIDIA H100 NVL": None,
        "NVIDIA GeForce RTX 4090": None,
    }
    for name, profile in known.items():
        memory = 42 * 10**9 if "40GB" in name else 85 * 10**9
        assert _profile_of(name, memory) == profile, name
        assert profile is None or profile in CLUSTERS


def test_where_no_formula_is_known_nothing_is_logged_unless_the_user_says_it() -> None:
    ((none,), (own,)) = together(1, {"none": (others, None), "own": (others, 5e6)}).values()
    assert none["tokens_per_second"] > 0 and "tflops_per_device" not in none
    assert own["tflops_per_device"] == pytest.approx(5e-6 * own["tokens_per_second"])
