"""A small model with Muon for hidden matrices and AdamW for the rest, as one optimizer or as two, and a fit of it."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

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


class TrustRatio(Optimizer):
    """What a third party might write: each matrix's step is scaled by its own norm (LARS), in its own precision."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).mul_(0.9).add_(p.grad)
                ratio = p.norm(dim=(-2, -1), keepdim=True) / momentum.norm(dim=(-2, -1), keepdim=True)
                p.sub_(momentum * ratio * group["lr"])


class TwoOptimizers(Model):
    """In manual optimization."""

    of_matrices: type[Optimizer] = Muon

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
        return [self.of_matrices(matrices, lr=5e-4), torch.optim.AdamW(rest, lr=2e-3)]  # type: ignore[call-arg]


class TwoInFullPrecision(TwoOptimizers):
    """Muon of torch multiplies in bf16, and rounding there may make much of the last bit of a gradient in fp32."""

    of_matrices = TrustRatio


KINDS = {"one": OneOptimizer, "two": TwoOptimizers, "two in full precision": TwoInFullPrecision}


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
    run.fit(module, Data(8), ckpt_path=ckpt_path)
    if save is not None:
        run.save_checkpoint(save)
    return gathered(module, run)
