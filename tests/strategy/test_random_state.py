"""Dropout draws alike over the tensor axis and differently over the data axis."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from helpers.behaviour_modules import TED, batches, loader, new_trainer
from helpers.layout_errors import distance
from helpers.ranks import on_ranks
from torch import Tensor

from lightning_tex.models import Decoder, DecoderConfig


class Dropout(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        config = DecoderConfig(61, 16, 2, 4, hidden_dim=16, num_experts=4, dropout=0.4)
        self.model, self.activations = Decoder(config), []
        self.model.norm.register_forward_hook(lambda module, args, y: self.activations.append(y.detach().clone()))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.model(batch[0])[..., :30].square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_dropout(layout: Any) -> dict[str, Any]:
    L.seed_everything(3, verbose=False)
    module = Dropout()
    trainer = new_trainer(layout)
    trainer.fit(module, loader(batches(3)))  # the same batches on every data rank
    return {"activations": torch.cat(module.activations), "state": torch.random.get_rng_state()}


def test_dropout_is_alike_over_tensor_and_different_over_data() -> None:
    found = on_ranks(4, fit_dropout, TED)
    for first, second in ((0, 1), (2, 3)):
        torch.testing.assert_close(found[first]["activations"], found[second]["activations"], rtol=1e-12, atol=1e-12)
        assert torch.equal(found[first]["state"], found[second]["state"])
    assert distance(found[0]["activations"], found[2]["activations"]) > 0.1
    assert not torch.equal(found[0]["state"], found[2]["state"])
