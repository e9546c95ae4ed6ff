"""Attention with norms over the heads of a rank, of which tensor ranks have partial gradients."""

from __future__ import annotations

import os
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from helpers.checkpoint_runs import Data
from helpers.trainers import quiet, silence
from lightning_tex import TexMoEStrategy
from lightning_tex.layers import ParallelAttention, VocabParallelCrossEntropy, VocabParallelEmbedding, VocabParallelHead
from lightning_tex.moe import MoE
from lightning_tex.parallel.sharding import parameter_shardings

VOCABULARY = 61


class HeadNorms(ParallelAttention):
    """Query and key heads are normed, as a user may do it."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        self.query_norm, self.key_norm = nn.RMSNorm(self.head_dim), nn.RMSNorm(self.head_dim)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().heads(x)
        return self.query_norm(query), self.key_norm(key), value


class Declared(HeadNorms):
    partial_gradients = ("query_norm", "key_norm")


class NormedDecoder(L.LightningModule):
    """One block with such attention, experts, and buffers."""

    def __init__(self, attention: type[HeadNorms]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.attend = VocabParallelEmbedding(VOCABULARY, 16), attention(16, 4)
        self.experts, self.head = MoE(16, 24, num_experts=4, top_k=2), VocabParallelHead(16, VOCABULARY)
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("drawn", torch.ones(3), persistent=False)
        self.loss = VocabParallelCrossEntropy()
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        x = self.embed(batch[0])
        x = x + self.attend(x)
        loss = self.loss(self.head(x + self.experts(x)), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def fit_normed(attention: type[HeadNorms], steps: int, **strategy: Any) -> dict[str, Tensor]:
    """A fit on this process's world: the whole parameters it ends with."""
    silence()
    world = int(os.environ.get("WORLD_SIZE", 1))
    module = NormedDecoder(attention)
    trainer = quiet(
        devices=world,
        strategy=TexMoEStrategy(**strategy),
        precision="64-true",
        max_steps=steps,
        use_distributed_sampler=False,
    )
    trainer.fit(module, Data())
    topology = trainer.strategy.topology
    parameters = dict(module.named_parameters())
    shardings = parameter_shardings(module, topology)
    return {name: sharding.gather(parameters[name].detach()).clone() for name, sharding in shardings.items()}
