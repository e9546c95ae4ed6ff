"""FLOPs that MFU is logged from, of what a decoder may be made of: those that its operations count."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.perturbed import LENGTH, Perturbed, batches, config
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_tex.moe import auxiliary_loss
from lightning_tex.planner.describe import describe
from lightning_tex.planner.model_flops import token_flops
from lightning_tex.planner_trace.flops import operation_flops

KINDS: dict[str, dict[str, Any]] = {
    "widths": {"head_dim": 10, "expert_hidden_dim": 6, "first_dense_layers": 1},
    "shared expert and biases": {"shared_expert_hidden_dim": 10, "expert_bias": True, "attention_bias": True},
    "latent attention": {
        "kv_lora_rank": 7, "q_lora_rank": 5, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 10,
    },
    "latent attention without a latent of queries": {
        "kv_lora_rank": 7, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 10,
    },
}  # fmt: skip


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.flops += operation_flops(func, args, kwargs or {}, result)
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_formulas_count_what_runs(kind: str) -> None:
    (batch,) = batches()
    module = Perturbed(config(**KINDS[kind]))
    with Counted() as counted:
        loss, _ = module._loss_sum(batch)
        (loss + auxiliary_loss(module)).backward()
    # The CPU's attention computes its scores once more in the backward: 5 products where the formula has 4.
    again = sum(2 * LENGTH * block.attention.num_heads * width(block.attention) for block in module.decoder.blocks)
    biases = 3 * 2 * 24 * 4 * sum(layer.output_biases is not None for _, layer in module.decoder.moe_layers())
    expected = token_flops(describe(module), LENGTH) + again + biases
    assert counted.flops / batch["input_ids"].numel() == pytest.approx(expected, rel=1e-6)


def width(attention: Any) -> int:
    return getattr(attention, "head_dim", None) or attention.qk_nope_head_dim + attention.qk_rope_head_dim
