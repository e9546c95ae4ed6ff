"""A micro-step of a few blocks made into that of all is the one that is traced of all."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cases import case
from torch import nn

from lightning_tex import LanguageModel
from lightning_tex.lora import LoRAConfig
from lightning_tex.models import DecoderConfig
from lightning_tex.parallel.layout import Communication, Layout
from lightning_tex.planner.batches import TokenBlocks
from lightning_tex.planner.describe import describe
from lightning_tex.planner.few_blocks import FewBlocks
from lightning_tex.planner.layouts import Candidate, Job
from lightning_tex.planner.memory import memory
from lightning_tex.planner.micro_step_trace import MicroStepTrace, trace_micro_step
from lightning_tex.planner.traced import TracedActivations

S, B = 64, 2
SIZES: dict[str, Any] = {
    "vocab_size": 500, "dim": 64, "num_heads": 4, "max_sequence_length": S, "num_experts": 4, "top_k": 2,
    "moe_every": 1,
}  # fmt: skip
WINDOWS = {"sliding_window": 16, "attention_sinks": True}
# By name: the decoder, what is trained of it, and blocks before the first repetition, of one, repetitions left out.
MODELS: dict[str, tuple[DecoderConfig, dict[str, Any], tuple[int, int, int]]] = {
    "windows in turn": (
        DecoderConfig(num_layers=9, layer_types=["sliding_attention", "full_attention"] * 4 + ["sliding_attention"],
                      expert_bias=True, **WINDOWS, **SIZES),
        {}, (0, 2, 1),
    ),
    "dense first": (
        DecoderConfig(num_layers=6, first_dense_layers=1, shared_expert_hidden_dim=32, qk_norm="full",
                      tie_embeddings=False, **SIZES),
        {}, (1, 1, 2),
    ),
    "every second": (DecoderConfig(num_layers=8, **{**SIZES, "moe_every": 2}, clip_qkv=2.0), {}, (0, 2, 1)),
    "adapters": (
        DecoderConfig(num_layers=6, **SIZES), {"lora": LoRAConfig(rank=4, targets=("attention.*", "experts.*"))},
        (0, 1, 2),
    ),
}  # fmt: skip
LAYOUTS = Layout(1), Layout(4, 2, 2, 2), Layout(4, 2, 4, 1)
MODES = None, "full", "communication_aware"


def built(config: DecoderConfig, trained: dict[str, Any]) -> LanguageModel:
    module = LanguageModel(config, **trained)
    module.build_on_meta()
    return module


class _Known(TracedActivations):
    """With one trace, which is known."""

    def __init__(self, trace: MicroStepTrace) -> None:
        self.trace, self._traces = trace, {}

    def _trace(self, *_: Any) -> MicroStepTrace:
        return self.trace


def as_all_blocks_say(name: str, layout: Layout, mode: Any, precision: str, mask: bool = False) -> None:
    config, trained, repeated = MODELS[name]
    module = built(config, trained)
    few = FewBlocks.of(module)
    assert few is not None and (few.first, few.period, few.left_out) == repeated
    given = TokenBlocks(config.vocab_size, mask)
    sequence = Communication(sequence_parallel=layout.tensor > 1)
    candidate = Candidate(layout, B, 1, activation_checkpointing=mode, communication=sequence)
    job = Job(describe(module), layout.world, S, B * layout.data, precision, document_mask=mask)
    whole = trace_micro_step(module, None, given, job, candidate, "cuda")
    made = few.extended(trace_micro_step(few.module, None, given, job, candidate, "cuda", few.marks))
    assert made is not None
    # The losses of all routers are summed after the last block, a few numbers each.
    numbers = len(whole.reached) - len(made.reached)
    assert 0 <= numbers <= 12 * few.left_out * few.period and 0 <= whole.forward - made.forward <= numbers
    assert np.array_equal(np.unique(whole.reached[[0, -1]]), np.unique(made.reached[[0, -1]]))
    for stage in (1, 2):
        seen, expected = (
            memory(replace(job, activations=_Known(trace)), replace(candidate, zero_stage=stage))
            for trace in (made, whole)
        )
        # In which order a block's gradients arrive differs from run to run.
        assert seen.peak == pytest.approx(expected.peak, rel={1: 1e-5, 2: 1e-3}[stage]), (seen, expected)


@pytest.mark.parametrize(
    ("name", "layout", "mode", "precision"),
    [
        ("dense first", LAYOUTS[1], "communication_aware", "bf16-mixed"),
    ],
)
def test_a_step_of_all_blocks_is_made_of_that_of_a_few(name: str, layout: Layout, mode: Any, precision: str) -> None:
    as_all_blocks_say(name, layout, mode, precision)


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_steps_on_every_layout_are_made_of_those_of_a_few(name: str) -> None:
    for number, (layout, mode) in enumerate(itertools.product(LAYOUTS, MODES)):
        with case(layout, mode):
            as_all_blocks_say(name, layout, mode, ("bf16-mixed", "32-true")[number % 2], mask=number % 3 == 1)


def test_what_does_not_repeat_is_traced_whole() -> None:
    config = DecoderConfig(num_layers=4, **SIZES)
    assert FewBlocks.of(built(config, {})) is not None
    assert FewBlocks.of(built(replace(config, num_layers=3), {})) is None
    assert FewBlocks.of(built(replace(config, moe_layers=[0, 3]), {})) is None
    assert FewBlocks.of(built(config, {"frozen": ["blocks.2"]})) is None

    class Own(LanguageModel):
        pass

    own = Own(config)
    own.build_on_meta()
    assert FewBlocks.of(own) is None


def test_the_whole_model_is_left_as_it_is() -> None:
    module = built(DecoderConfig(num_layers=5, **SIZES), {})
    blocks, names = list(module.decoder.blocks), [name for name, _ in module.named_parameters()]
    few = FewBlocks.of(module)
    assert len(few.module.decoder.blocks) == 3 and isinstance(few.module.decoder.blocks, nn.ModuleList)
    assert list(module.decoder.blocks) == blocks and [name for name, _ in module.named_parameters()] == names
    assert all(p.device == torch.device("meta") for p in few.module.parameters())
