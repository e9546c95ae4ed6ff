"""A small model with Muon for hidden matrices and AdamW for the rest, as one optimizer or as two, and a fit of it."""

from __future__ import annotations

from typing import Any
from unittest import mock

import lightning as L
import torch
from torch import Tensor
from torch.optim import _muon

import lightning_tex as tex
from helpers.checkpoint_runs import Data, Model, trainer
from helpers.trainers import gathered
from lightning_tex.moe import auxiliary_loss
from lightning_tex.optim import Muon, MuonAdamW, hidden_matrices


class OneOptimizer(Model):
    """In automatic optimization."""

    def configure_optimizers(self) -> Any:
        optimizer = MuonAdamW(self, lr=2e-3, muon_lr=5e-4)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.2 * step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def orthogonalized(gradient: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """What torch's Muon makes of a gradient [n, m], multiplied in the gradient's precision, not in bf16.

    There two gradients in fp32 that differ in the last bit may be rounded to two that differ in the eighth.
    """
    a, b, c = coefficients
    tall = gradient.size(0) > gradient.size(1)
    x = gradient.T if tall else gradient
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class TwoOptimizers(Model):
    """In manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], index: int) -> None:  # type: ignore[override]
        each = self.optimizers()
        for optimizer in each:
            optimizer.zero_grad()
        self.manual_backward(self._loss(batch) + auxiliary_loss(self))
        for optimizer in each:
            self.clip_gradients(optimizer, gradient_clip_val=0.5)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        matrices, rest = hidden_matrices(self)
        return [Muon(matrices, lr=5e-4), torch.optim.AdamW(rest, lr=2e-3)]


KINDS = {"one": OneOptimizer, "two": TwoOptimizers, "two in full precision": TwoOptimizers}


def fit(
    kind: str,
    layout: dict[str, Any] | None,
    devices: int,
    precision: str,
    steps: int = 3,
    ckpt_path: str | None = None,
    save: str | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Parameters after some steps.

    Args:
        layout: arguments of the strategy; ``None`` for ``strategy="auto"``.
    """
    L.seed_everything(5, verbose=False)
    module = KINDS[kind]()
    strategy = "auto" if layout is None else tex.TexMoEStrategy(**layout)
    if kind == "one":
        options = {"gradient_clip_val": 0.5, **options}
    run = trainer(strategy, devices, -1, precision, max_steps=steps, **options)
    multiplies = orthogonalized if "full precision" in kind else _muon._zeropower_via_newtonschulz
    with mock.patch.object(_muon, "_zeropower_via_newtonschulz", multiplies):
        run.fit(module, Data(8), ckpt_path=ckpt_path)
    if save is not None:
        run.save_checkpoint(save)
    return gathered(module, run)
