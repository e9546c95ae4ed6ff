"""Every combination of communication options trains as the baseline does: losses, gradients and parameters, by SGD."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from helpers.behaviour_modules import batches, gathered, loader, own_slices
from helpers.cases import case
from helpers.layout_errors import distance
from helpers.ranks import together
from helpers.trainers import quiet
from torch import Tensor

import lightning_tex as tex
from lightning_tex.bench.combinations import COMBINATIONS
from lightning_tex.layers import VocabParallelCrossEntropy
from lightning_tex.models import Decoder, DecoderConfig
from lightning_tex.parallel.sharding import parameter_shardings

STEPS = 4


class Trained(L.LightningModule):
    """A decoder in which choices overflow; keeps its losses and the combined gradients of its last step."""

    def __init__(self, capacity_factor: float | None) -> None:
        super().__init__()
        torch.manual_seed(1)
        sizes: dict[str, Any] = {"vocab_size": 61, "dim": 16, "num_layers": 2, "num_heads": 4, "hidden_dim": 24}
        experts: dict[str, Any] = {"num_experts": 4, "top_k": 2, "moe_every": 1, "capacity_factor": capacity_factor}
        self.decoder, self.cross_entropy = Decoder(DecoderConfig(**sizes, **experts)), VocabParallelCrossEntropy()
        self.losses: list[Tensor] = []
        self.gradients: dict[str, Tensor] = {}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.cross_entropy(self.decoder(batch[0]), batch[1])
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3)


class LastGradients(L.Callback):
    """Makes gradients whole, which an overlapping backward allows as any other does."""

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        module.gradients = {name: p.grad.clone() for name, p in module.named_parameters()}


def run(name: str, capacity_factor: float | None, precision: str) -> dict[str, Tensor]:
    combination = COMBINATIONS[name]
    strategy = tex.TexMoEStrategy(tensor_parallel_size=2, **{"expert_parallel_size": 2, **combination.options(2, 2)})
    strategy.adopt(combination.communication(strategy.communication))
    module = Trained(capacity_factor)
    flags: dict[str, Any] = {"devices": 4, "max_epochs": 1, "use_distributed_sampler": False}
    trainer = quiet(strategy=strategy, precision=precision, callbacks=[LastGradients()], **flags)
    given = [[part.repeat(1, 2)[:, :6] for part in batch] for batch in batches(STEPS)]
    trainer.fit(module, loader(own_slices(trainer, given)))
    placed = parameter_shardings(module, strategy.topology)
    whole = {f"gradient of {key}": placed[key].gather(gradient) for key, gradient in module.gradients.items()}
    return {
        "losses": strategy.reduce(torch.stack(module.losses), reduce_op="mean"),
        **whole,
        **gathered(module, trainer),
    }


@pytest.mark.parametrize(
    ("precision", "tolerance", "capacity_factor"),
    [
        ("64-true", 1e-10, 0.8),
        pytest.param("64-true", 1e-10, None, marks=pytest.mark.full),
        pytest.param("32-true", 1e-5, 0.8, marks=pytest.mark.full),
        pytest.param("32-true", 1e-5, None, marks=pytest.mark.full),
    ],
)
def test_every_combination_equals_the_baseline(precision: str, tolerance: float, capacity_factor: float | None) -> None:
    by_name = together(4, {name: (run, name, capacity_factor, precision) for name in COMBINATIONS})
    for name in COMBINATIONS:
        for got, baseline in zip(by_name[name], by_name["baseline"], strict=True):
            assert baseline["losses"][-1] < baseline["losses"][0]
            with case(name):
                assert got.keys() == baseline.keys()
                worst = {key: distance(got[key], value) for key, value in baseline.items()}
                assert all(error <= tolerance for error in worst.values()), max(worst, key=worst.__getitem__)
