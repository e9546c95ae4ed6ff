"""bf16-mixed: what is kept in which precision, and that it learns as fp32 does."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from helpers.behaviour_modules import LAYOUTS, batches, new_trainer, on_data_axis, on_ranks, together
from helpers.layout_errors import distance
from torch import Tensor, nn

from lightning_tex.layers import VocabParallelCrossEntropy
from lightning_tex.models import Decoder, DecoderConfig
from lightning_tex.moe import Router, auxiliary_loss


class Falls(L.LightningModule):
    """Learns to copy one batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model = Decoder(DecoderConfig(61, 32, 2, 4, hidden_dim=32, num_experts=4, top_k=2))
        self.cross_entropy, self.losses = VocabParallelCrossEntropy(), []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.cross_entropy(self.model(batch[0]), batch[1])
        self.losses.append(float(loss))
        return loss + auxiliary_loss(self)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def fit_in(layout: Any, precision: str) -> dict[str, Any]:
    module = Falls()
    trainer = new_trainer(layout, precision=precision)
    trainer.fit(module, on_data_axis(trainer, batches(1) * 40))
    kept = (Router, nn.RMSNorm)
    full = {p.dtype for part in module.modules() if isinstance(part, kept) for p in part.parameters(recurse=False)}
    low = {p.dtype for part in module.modules() if not isinstance(part, kept) for p in part.parameters(recurse=False)}
    masters = {shard.states.values.dtype for shard in trainer.strategy.optimizers[0].shards}
    losses = trainer.strategy.reduce(torch.tensor(module.losses), reduce_op="mean")
    return {"full": full, "low": low, "masters": masters, "losses": losses}


@pytest.fixture(scope="module")
def exact() -> Tensor:
    """Losses in fp32, which no layout changes."""
    return on_ranks(1, fit_in, {}, "32-true")[0]["losses"]


@pytest.fixture(scope="module")
def learnt() -> dict[str, list[dict[str, Any]]]:
    return together(4, {name: (fit_in, layout, "bf16-mixed") for name, layout in LAYOUTS.items()})


@pytest.mark.parametrize("name", LAYOUTS)
def test_bf16_mixed(learnt: dict[str, list[dict[str, Any]]], exact: Tensor, name: str) -> None:
    for found in learnt[name]:
        assert (found["full"], found["low"]) == ({torch.float32}, {torch.bfloat16})
        assert found["masters"] == {torch.float32}
        assert found["losses"][-1] < 0.6 * found["losses"][0]
        assert distance(found["losses"], exact) < 0.02, (found["losses"], exact)
