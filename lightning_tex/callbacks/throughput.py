"""Tokens per second, and how much of the devices' arithmetic they use."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info


class Throughput(Callback):
    """Log the speed of training since the last logged step; in between nothing waits for a device.

    ``tokens_per_second``: tokens of all data ranks. Time in validation and checkpoint saving does not count. Tokens are
    those of ``batch["input_ids"]``.

    ``tflops_per_device``: model TFLOP/s of one device, under ``strategy="tex_moe"``. They are analytic: a forward, and
    a backward of twice that, of every product on whole matrices; attention over the whole square; a token's chosen
    experts. What recomputation repeats, what tensor ranks compute alike and padding to shapes is not counted: with
    ``activation_checkpointing="full"`` the device computes up to 4/3 of it.

    ``mfu``: that by the data sheet's peak of the device in the run's precision, where the device is one of
    ``lightning-tex plan``'s (V100, A100, H100 and H200 of NVIDIA).

    Formulas are those of TEX layers and ``nn.Linear``, each taken to be applied to every token once. Where a module has
    matrices in other layers, neither is logged, which is said once.

    Args:
        flops_per_token: of training on one token, in place of the formulas, for a module that has none.
    """

    def __init__(self, flops_per_token: float | None = None) -> None:
        self.flops_per_token = flops_per_token
        self._told = self._counted = False
        self._known: Any = None  # a strategy's TrainingFlops

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._begin_window()
        self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._known = known = getattr(trainer.strategy, "training_flops", None)
        self._counted = self.flops_per_token is not None or (known is not None and not known.unknown)
        if not self._counted and not self._told:
            self._told = True
            why = "formulas are TexMoEStrategy's" if known is None else f"none has {', '.join(known.unknown)}"
            rank_zero_info(f"tflops_per_device and mfu are not logged: {why}; Throughput(flops_per_token=) gives them")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            return
        logged = trainer._logger_connector.should_update_logs
        if logged and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)  # the time of queued kernels belongs to these steps
        ids = batch["input_ids"]
        self._tokens += ids.numel()
        if self._counted:
            self._flops += ids.numel() * self._of_token(ids.shape[-1])
        self._seconds += time.perf_counter() - self._started
        if logged:
            self._log(trainer, pl_module)
            self._begin_window()

    def _begin_window(self) -> None:
        self._tokens, self._flops, self._seconds = 0, 0.0, 0.0

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds = max(self._seconds, 1e-9)
        # Figures come to the host here, once: a progress bar that shows them in every step waits for nothing.
        mine = torch.tensor([self._tokens, self._flops / 1e12], device=pl_module.device)
        tokens, tflops = trainer.strategy.reduce(mine, reduce_op="sum").cpu().unbind()
        pl_module.log("tokens_per_second", tokens / seconds, prog_bar=True)
        if not self._counted:
            return
        of_device = tflops / seconds / trainer.world_size
        pl_module.log("tflops_per_device", of_device)
        if self._known is not None and self._known.peak is not None:
            pl_module.log("mfu", of_device * 1e12 / self._known.peak)

    def _of_token(self, length: int) -> float:
        """FLOPs of training on a token of a sequence of that length."""
        if self.flops_per_token is not None:
            return self.flops_per_token
        return self._known.of_token(length)
