"""A step of decoders with adapters, sinks and documents holds what is foreseen: traced, but where formulas hold."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from helpers.backwards import announced_backward
from helpers.topologies import join

from lightning_tex import LanguageModel
from lightning_tex.bench.memory import peak_bytes
from lightning_tex.lora import LoRAConfig
from lightning_tex.models import DecoderConfig
from lightning_tex.moe import Router
from lightning_tex.optim import OptimizerStateConfig, TiledOptimizer
from lightning_tex.parallel.activation_checkpointing import recompute_blocks
from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.sharding import parameter_shardings, shard_module
from lightning_tex.parallel.topology import Axis
from lightning_tex.planner.batches import TokenBlocks
from lightning_tex.planner.cluster import CLUSTERS
from lightning_tex.planner.describe import describe
from lightning_tex.planner.fake_values import Routing
from lightning_tex.planner.layouts import Candidate, Job
from lightning_tex.planner.memory import memory
from lightning_tex.planner.optimizer_trial import read_optimizer
from lightning_tex.planner.pretended_trainer import PretendedTrainer
from lightning_tex.planner.traced import TracedActivations
from lightning_tex.planner.work import computation
from lightning_tex.strategy.precision import TexMixedPrecision
from lightning_tex.testing.ranks import run_ranks

S, B = 256, 4
SIZES: dict[str, Any] = {
    "vocab_size": 512, "dim": 128, "num_layers": 3, "num_heads": 8, "num_kv_heads": 4, "hidden_dim": 192,
    "max_sequence_length": S, "num_experts": 8, "top_k": 2, "moe_every": 1, "tie_embeddings": False,
}  # fmt: skip
SINKS: dict[str, Any] = {
    "attention_sinks": True, "sliding_window": 32, "activation": "clamped_swiglu", "expert_bias": True,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "attention_bias": True,
    "router": {"name": "softmax", "init_args": {"bias": True}}, "norm_topk_prob": True,
}  # fmt: skip
ALL = LoRAConfig(rank=8, targets=("attention.*", "experts.*"))


class Case(NamedTuple):
    config: dict[str, Any]
    lora: LoRAConfig | None = None
    documents: bool = False
    mode: Any = None
    precision: str = "bf16-mixed"


CASES = {
    "adapters of all matrices": Case({"qk_norm": "full"}, ALL),
    "adapters, recomputed": Case({"qk_norm": "full"}, ALL, mode="full"),
    "adapters of attention in fp32": Case({}, LoRAConfig(rank=8, targets=("query", "value")), precision="32-true"),
    "adapters and documents": Case({"qk_norm": "full"}, ALL, documents=True),
    "all weights of OLMoE's kind": Case({"qk_norm": "full"}),
    "all weights and documents, by formulas": Case({}, documents=True),
    "all weights, documents": Case({"qk_norm": "full"}, documents=True),
    "sinks and windows": Case(SINKS),
    "sinks and windows, recomputed": Case(SINKS, mode="full"),
}
DEFAULT = ("adapters and documents",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in DEFAULT else pytest.mark.full) for n in CASES])
def test_a_step_holds_what_is_foreseen(name: str) -> None:
    ((seen, foreseen),) = run_ranks(1, measured_and_foreseen, CASES[name])
    assert foreseen == pytest.approx(seen, rel=0.05)


def measured_and_foreseen(case: Case) -> tuple[float, float]:
    """What a step holds above the states, by torch's record and foreseen."""
    warnings.simplefilter("ignore")
    config, lora, documents, mode, precision = case
    topology = join(1, 1, 1, overlap=False)
    module, traced_one = (_built(config, lora) for _ in range(2))
    batches = TokenBlocks(SIZES["vocab_size"], documents)
    model = describe(module)
    traced = None if model.declared else TracedActivations(traced_one, None, batches)
    job = Job(model, 1, S, B, precision, 1.0, read_optimizer(module), traced, documents)
    shard_module(module, topology)
    recompute_blocks(module, mode)
    if precision == "bf16-mixed":
        TexMixedPrecision("bf16-mixed", "cpu").convert_module(module)
    parameters = dict(module.named_parameters())
    shardings = {parameters[name]: s for name, s in parameter_shardings(module, topology).items()}
    optimizer = TiledOptimizer(
        module.configure_optimizers(), shardings, topology.world, OptimizerStateConfig(zero_stage=1),
        topology.communication,
    )  # fmt: skip

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext():
            loss = module.training_step(batches.of(B, S), 0)
        optimizer.zero_grad()
        announced_backward(optimizer, loss, undisturbed=True)
        optimizer.step()

    step()
    seen = float(peak_bytes(step, torch.device("cpu")))
    return seen, memory(job, Candidate(topology.layout, B, 1, 1, mode), "cpu").fullest.bytes


def _built(config: dict[str, Any], lora: LoRAConfig | None) -> LanguageModel:
    module = LanguageModel(DecoderConfig(**{**SIZES, **config}), lora=lora)
    module.configure_model()
    module.trainer = PretendedTrainer(Axis("data"), 1)
    for router in module.modules():  # as many choices on each expert, as in a trace
        if isinstance(router, Router):
            router.register_forward_hook(_even)
    return module


def _even(router: Router, _: Any, route: Any) -> Any:
    return route._replace(indices=Routing().choose(*route.indices.shape, route.scores.shape[-1]))


def test_matrices_beside_adapters_have_no_gradients_but_those_of_experts() -> None:
    whole, adapted, attention = (
        Job(describe(_built({}, lora)), 1, S, B) for lora in (None, ALL, LoRAConfig(rank=8, targets=("attention.*",)))
    )

    def frozen(job: Job) -> set[str]:
        return {type(placed.layer).__name__ for placed in job.model.layers if placed.frozen}

    assert frozen(whole) <= {"LinearCrossEntropy"}
    assert {"Attention", "Head"} <= frozen(adapted) and "Moe" not in frozen(adapted) and "Moe" in frozen(attention)
    candidate, cluster = Candidate(Layout(1), B), CLUSTERS["h100"]
    counted = [computation(job, candidate, cluster).flops for job in (whole, adapted, attention)]
    projections = 2 * B * S * SIZES["dim"] * (2 * SIZES["dim"] + 2 * SIZES["dim"] // 2)
    head = 2 * B * S * SIZES["dim"] * SIZES["vocab_size"]
    assert counted[0] - counted[1] == SIZES["num_layers"] * projections + head
    routed = 2 * B * S * SIZES["dim"] * (3 * SIZES["hidden_dim"] * SIZES["top_k"] + SIZES["num_experts"])
    assert counted[1] - counted[2] == SIZES["num_layers"] * routed
