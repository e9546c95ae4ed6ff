"""Every error comes as early as it can be known and names the option, the numbers and what would be legal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from helpers.layout_runs import SlicedData
from helpers.ranks import on_ranks
from helpers.trainers import quiet
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

import lightning_tex as tex
from lightning_tex.layers import VocabParallelCrossEntropy
from lightning_tex.models import Decoder, DecoderConfig

CONFIG: dict[str, Any] = {"vocab_size": 61, "dim": 16, "num_layers": 2, "num_heads": 8, "hidden_dim": 16}


def new_trainer(devices: int, precision: Any = None, plugins: Any = None, **changes: Any) -> L.Trainer:
    options = {name: changes.pop(name) for name in list(changes) if name in ("sync_batchnorm",)}
    strategy = tex.TexMoEStrategy(**changes)
    flags = {"devices": devices, "precision": precision, "plugins": plugins, **options}
    return quiet(strategy=strategy, max_steps=1, use_distributed_sampler=False, **flags)


class Plain(L.LightningModule):
    """A decoder with the optimizer it is told."""

    def __init__(self, optimizers: Callable[..., Any] = torch.optim.SGD, **changes: Any) -> None:
        super().__init__()
        self.model = Decoder(DecoderConfig(**{**CONFIG, "num_experts": 8, **changes}))
        self.cross_entropy, self.make = VocabParallelCrossEntropy(), optimizers

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters(), lr=0.1)


# --- layout against world: when the Trainer is built, before any process or process group


@pytest.mark.parametrize(
    ("devices", "arguments", "words"),
    [
        (4, {"tensor_parallel_size": 3}, ("tensor_parallel_size=3", "4 ranks", "1, 2, 4")),
        (8, {"tensor_parallel_size": 16}, ("tensor_parallel_size=16", "8 ranks", "1, 2, 4, 8")),
        (4, {"tensor_parallel_size": 0}, ("tensor_parallel_size=0", "1, 2, 4")),
        (1, {"timeout": 0}, ("timeout=0 s", "seconds above 0")),
        (4, {"expert_parallel_size": 3}, ("expert_parallel_size=3", "4 ranks", "1, 2, 4")),
        (8, {"tensor_parallel_size": 2, "expert_parallel_size": 8}, ("expert_parallel_size=8", "1, 2, 4")),
        (8, {"expert_parallel_size": "most"}, ("expert_parallel_size='most'", "1, 2, 4, 8")),
        (
            8,
            {"tensor_parallel_size": 4, "expert_tensor_parallel_size": 2},
            ("expert_tensor_parallel_size=2", "tensor_parallel_size=4", "4", "1"),
        ),
        (
            4,
            {"tensor_parallel_size": 2, "expert_tensor_parallel_size": 1, "duplicate_token_dropping": False},
            ("duplicate_token_dropping=False", "expert_tensor_parallel_size=1", "legal: True"),
        ),
    ],
)
def test_layout_that_the_world_does_not_allow(devices: int, arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"legal") as caught:
        new_trainer(devices, **arguments)
    assert not dist.is_initialized()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"zero_stage": 3}, ("zero_stage=3", "0, 1, 2")),
        ({"max_skipped_steps": 0}, ("max_skipped_steps=0", "1 or more")),
        ({"optimizer_state_format": "int4"}, ("optimizer_state_format='int4'", "'fp32'")),
        ({"activation_checkpointing": "some"}, ("activation_checkpointing='some'", "None")),
        (
            {"activation_checkpointing_policy": {int}},
            ("activation_checkpointing_policy", "activation_checkpointing=None"),
        ),
        ({"tile_size": 0}, ("tile_size=0", "1 or more")),
        ({"expert_chunks": 0}, ("expert_chunks=0", "at least 1", "'auto'")),
    ],
)
def test_option_that_does_not_exist(arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"legal") as caught:
        tex.TexMoEStrategy(**arguments)
    for word in words:
        assert word in str(caught.value)


class OwnPrecision(Precision):
    precision = "8-true"


@pytest.mark.parametrize(
    ("precision", "plugins", "words"),
    [
        ("transformer-engine", None, ()),
        (None, OwnPrecision(), ("8-true", "OwnPrecision")),
    ],
)
def test_precision_that_is_not_supported(precision: Any, plugins: Any, words: tuple[str, ...]) -> None:
    if precision == "transformer-engine":
        with pytest.raises((MisconfigurationException, ModuleNotFoundError)):
            new_trainer(1, precision)
        return
    with pytest.raises(MisconfigurationException, match="legal: '32-true', '64-true', 'bf16-mixed'") as caught:
        new_trainer(1, precision, plugins)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "16-mixed", "16-true"])
@pytest.mark.parametrize("optimizer_state_format", ["split", "int8", "stochastic"])
def test_format_that_is_made_for_bf16(precision: str, optimizer_state_format: str) -> None:
    for outcome in on_ranks(1, fit_in_format, precision, optimizer_state_format):
        assert outcome["refused"] and outcome["steps"] == 0
        for word in (f"optimizer_state_format='{optimizer_state_format}'", f"precision='{precision}'", "'bf16-mixed'"):
            assert word in outcome["text"], outcome["text"]


def fit_in_format(precision: str, optimizer_state_format: str) -> dict[str, Any]:
    plugin: Precision | None = MixedPrecision("16-mixed", "cpu") if precision == "16-mixed" else None
    trainer = new_trainer(1, None if plugin else precision, plugin, optimizer_state_format=optimizer_state_format)
    try:
        trainer.fit(Plain(), SlicedData(1))
    except ValueError as error:
        return {"refused": True, "text": str(error), "steps": trainer.global_step}
    return {"refused": False, "text": "nothing was raised", "steps": trainer.global_step}


# --- layout against model: before anything is sharded


def fit_error(arguments: dict[str, Any], changes: dict[str, Any], optimizers: Any = torch.optim.SGD) -> dict[str, Any]:
    """What a fit on this world raises, and what had happened until then."""
    module = Plain(optimizers, **changes)
    whole = {name: p.shape for name, p in module.named_parameters()}
    fit = new_trainer(2, **arguments)
    try:
        fit.fit(module, SlicedData(2))
    except (ValueError, MisconfigurationException) as error:
        replicated = {name: p.shape for name, p in module.named_parameters()} == whole
        return {"refused": True, "text": str(error), "unsharded": replicated, "steps": fit.global_step}
    return {"refused": False, "text": "nothing was raised", "unsharded": None, "steps": fit.global_step}


MODEL_ERRORS = [
    ({"expert_parallel_size": 2}, {"num_experts": 7}, ("num_experts=7", "expert_parallel_size=2", "legal", ": 1")),
    ({"expert_parallel_size": 2}, {"num_experts": 1}, ("expert_parallel_size=2", "no MoE", "legal: 1 or 'auto'")),
    ({"tensor_parallel_size": 2}, {"num_heads": 1}, ("num_heads=1", "tensor_parallel_size=2", "legal", ": 1")),
    ({"tensor_parallel_size": 2}, {"num_kv_heads": 1}, ("num_kv_heads=1", "tensor_parallel_size=2", "legal")),
    ({"tensor_parallel_size": 2}, {"hidden_dim": 15}, ("=15", "tensor_parallel_size=2", "legal")),
    (
        {"tensor_parallel_size": 2},
        {"hidden_dim": 15, "moe_every": 1},
        ("hidden_dim=15", "expert_tensor_parallel_size=2", "expert_tensor_parallel_size=1"),
    ),
    ({"sync_batchnorm": True}, {}, ("sync_batchnorm",)),
]


def all_model_errors() -> list[dict[str, Any]]:
    return [fit_error(arguments, changes) for arguments, changes, _ in MODEL_ERRORS]


def test_layout_that_the_model_does_not_allow() -> None:
    for outcomes in on_ranks(2, all_model_errors):
        for (arguments, changes, words), outcome in zip(MODEL_ERRORS, outcomes, strict=True):
            assert outcome["refused"], (arguments, changes, outcome)
            assert outcome["unsharded"], (arguments, changes)
            for word in words:
                assert word in outcome["text"], (arguments, changes, outcome["text"])


# --- optimizers


class Stranger:
    """An optimizer that also holds a parameter which is not the module's."""

    def __new__(cls, parameters: Any, lr: float) -> Any:
        return torch.optim.SGD([*parameters, nn.Parameter(torch.zeros(5))], lr=lr)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (torch.optim.LBFGS, ("LBFGS", "calls its closure 2 times")),
        (Stranger, ("shape (5,)", "not a parameter of the LightningModule")),
    ],
    ids=["LBFGS", "stranger"],
)
def test_optimizer_that_cannot_be_sharded(make: Any, words: tuple[str, ...]) -> None:
    for outcome in on_ranks(1, fit_error_alone, make):
        assert outcome["refused"], outcome
        assert outcome["steps"] == 0
        for word in words:
            assert word in outcome["text"], outcome["text"]


def fit_error_alone(make: Any) -> dict[str, Any]:
    import os

    os.environ.update(LOCAL_RANK="0")
    module = Plain(make)
    fit = new_trainer(1)
    try:
        fit.fit(module, SlicedData(2))
    except (ValueError, MisconfigurationException) as error:
        return {"refused": True, "text": str(error), "steps": fit.global_step}
    return {"refused": False, "text": "nothing was raised", "steps": fit.global_step}


def test_device_mesh_and_topology_do_not_exist_before_setup() -> None:
    strategy = tex.TexMoEStrategy()
    with pytest.raises(RuntimeError, match="only after the Trainer"):
        _ = strategy.device_mesh
    with pytest.raises(RuntimeError, match="only after the Trainer"):
        _ = strategy.topology


def test_a_notebook_that_asks_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_tex.strategy.launcher._IS_INTERACTIVE", True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(MisconfigurationException, match="starts its 2 processes by running the script again") as caught:
        new_trainer(2)
    assert "devices=1" in str(caught.value) and "torchrun" in str(caught.value)
    assert new_trainer(1).strategy.launcher.is_interactive_compatible
