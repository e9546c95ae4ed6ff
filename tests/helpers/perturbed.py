"""A small language model no parameter of which has the value that it is usually begun with."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from lightning_tex import LanguageModel
from lightning_tex.models import Decoder, DecoderConfig

VOCABULARY, LENGTH = 61, 8


class Perturbed(LanguageModel):
    """Norms, biases and all else are drawn, so that no error hides behind a one or a zero."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.decoder = Decoder(config)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for tensor in (*self.decoder.parameters(), *self.decoder.buffers()):
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))

    def configure_callbacks(self) -> list[L.Callback]:
        return []


def batches(count: int = 1, samples: int = 8) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (count, samples, LENGTH + 1), generator=generator)
    return [{"input_ids": one[:, :-1], "labels": one[:, 1:]} for one in ids]


def config(**changes: Any) -> DecoderConfig:
    sizes = {"dim": 24, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 20, "num_experts": 4}
    losses = {"load_balance_coefficient": 0.1, "z_loss_coefficient": 0.01}
    return DecoderConfig(VOCABULARY, **{**sizes, "top_k": 2, "moe_every": 1, **losses, **changes})
