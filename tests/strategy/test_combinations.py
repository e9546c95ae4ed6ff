"""Every combination of communication options trains as the baseline does: losses, gradients and parameters, by SGD."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from helpers.behaviour_modules import SmallDecoder, batches, loader, own_slices
from helpers.cases import case
from helpers.layout_errors import distance
from helpers.ranks import together
from helpers.trainers import gathered, quiet
from torch import Tensor

import lightning_tex as tex
from lightning_tex.bench.combinations import COMBINATIONS

STEPS = 2


class Overflowing(SmallDecoder):
    """In which choices overflow, with experts in every block; keeps the combined gradients of its last step."""

    def __init__(self, capacity_factor: float | None) -> None:
        super().__init__(moe_every=1, capacity_factor=capacity_factor)
        self.gradients: dict[str, Tensor] = {}

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
    module = Overflowing(capacity_factor)
    flags: dict[str, Any] = {"devices": 4, "max_epochs": 1, "use_distributed_sampler": False}
    trainer = quiet(strategy=strategy, precision=precision, callbacks=[LastGradients()], **flags)
    given = [[part.repeat(1, 2)[:, :6] for part in batch] for batch in batches(1) * STEPS]
    trainer.fit(module, loader(own_slices(trainer, given)))
    gradients = gathered(module, trainer, module.gradients)
    return {
        "losses": strategy.reduce(torch.stack(module.losses), reduce_op="mean"),
        **{f"gradient of {key}": gradient for key, gradient in gradients.items()},
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
