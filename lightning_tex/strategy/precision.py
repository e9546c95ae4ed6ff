"""Precision plugins: what is stored in which dtype."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.fabric import plugins as fabric_plugins
from lightning.fabric.plugins import Precision as FabricPrecision
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tex.optim import OptimizerStateConfig, ReductionStage, TiledOptimizer
from lightning_tex.parallel.precision import PRECISIONS, keeps_full_precision
from lightning_tex.strategy.train_step import TrainStep


class TexPrecision(TrainStep):
    """``32-true``: everything in fp32."""


class TexDoublePrecision(TrainStep, DoublePrecision):
    """``64-true``: everything in fp64."""


class TexMixedPrecision(TrainStep, MixedPrecision):  # type: ignore[misc]
    """16-bit parameters with fp32 masters in the optimizer, autocast active; routers and norms fp32.

    This differs from Lightning's own meaning (fp32 parameters, autocast only): parameters take half the memory.
    ``bf16-mixed``: parameters are bf16. ``16-mixed``: they are fp16, and the loss is scaled dynamically: an infinity or
    NaN in any gradient makes all ranks skip the step and lower the scale.

    Args:
        precision: ``"bf16-mixed"`` or ``"16-mixed"``.
        device: where autocast acts, ``"cpu"`` or ``"cuda"``.
        scaler: for ``16-mixed``, whose settings and scale to begin with; ``None``: torch's defaults.
    """

    def __init__(
        self,
        precision: Literal["16-mixed", "bf16-mixed"],
        device: str,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        super().__init__(precision, device, scaler)
        if self.scaler is not None:
            self.scaler = ShardedGradScaler.like(self.scaler, device)

    @property
    def _dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision].usual

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Cast floating parameters to 16 bits, except those of routers and norms."""
        for part in module.modules():
            if not keeps_full_precision(part):
                for parameter in part.parameters(recurse=False):
                    if parameter.is_floating_point():
                        parameter.data = parameter.data.to(self._dtype)
        return module

    def state_config(self, wanted: OptimizerStateConfig) -> OptimizerStateConfig:
        return wanted if self.scaler is None else super().state_config(wanted)

    def scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def _unscale(self, optimizer: TiledOptimizer) -> None:
        if self.scaler is not None and optimizer.reduction_stage is not ReductionStage.UNSCALED:
            self.scaler.unscale_(optimizer)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        self._before_clip(optimizer)
        super().clip_grad_by_norm(optimizer, clip_val)

    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        self._before_clip(optimizer)
        super().clip_grad_by_value(optimizer, clip_val)

    def _before_clip(self, optimizer: Optimizer) -> None:
        # Manual optimization clips before it steps, and may hand in Lightning's wrapper; the scaler knows optimizers by
        # identity and would take its scale out of the wrapped one once more.
        unwrapped = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        if isinstance(unwrapped, TiledOptimizer):
            self._unscale(unwrapped)

    def _step(self, optimizer: TiledOptimizer, **kwargs: Any) -> None:
        if self.scaler is None:
            super()._step(optimizer, **kwargs)
        else:
            self.scaler.step(optimizer, **kwargs)
            self.scaler.update()


class ShardedGradScaler(torch.amp.GradScaler):
    """torch's dynamic loss scale for gradients of which a rank has its own part, scaled on their way to the step.

    An infinity or NaN counts towards ``max_skipped_steps`` where no smaller scale would help: in the loss of any rank,
    which is not scaled yet, and once the scale has fallen to 1.
    """

    @classmethod
    def like(cls, scaler: torch.amp.GradScaler, device: str) -> ShardedGradScaler:
        """One with another's settings, at its scale."""
        own = cls(device, enabled=scaler.is_enabled())
        if scaler.is_enabled():
            own.load_state_dict(scaler.state_dict())
        return own

    def _unscale_grads_(  # type: ignore[override]
        self, optimizer: TiledOptimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        optimizer.unscale(inv_scale.double())
        return {found_inf.device: optimizer.infinite().to(found_inf.dtype)}

    def _maybe_opt_step(  # type: ignore[override]
        self, optimizer: TiledOptimizer, state: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        assert self._scale is not None
        optimizer.guard.excused = (self._scale > 1.0) & optimizer.losses_are_finite()
        return optimizer.step(*args, **kwargs)  # which leaves out what is not finite, without asking the device


class TexHalfPrecision(TrainStep, HalfPrecision):
    """``bf16-true`` and ``16-true``: parameters, optimizer states and everything computed in 16 bits, but scores of
    routers.

    In ``16-true`` gradients below 6e-8 are 0 and nothing scales the loss, and Adam's ``eps`` of 1e-8 is 0, too.
    """

    def state_config(self, wanted: OptimizerStateConfig) -> OptimizerStateConfig:
        """Without masters, unless a format is asked for, which there is for bf16."""
        wanted = wanted if self.precision == "bf16-true" else super().state_config(wanted)
        return replace(wanted, masters=False)


def tex_precision(plugin: FabricPrecision, refused: type[Exception] = MisconfigurationException) -> TrainStep:
    """The plugin of ours that does what one of the Trainer's or of Fabric's would, on the strategy's train step.

    Raises:
        MisconfigurationException: a precision that the strategy does not support, by name; or of the type ``refused``.
    """
    if isinstance(plugin, TrainStep):
        return plugin
    known: Any = plugin
    kind: Any = type(plugin)
    if kind in (Precision, FabricPrecision):
        return TexPrecision()
    if kind in (DoublePrecision, fabric_plugins.DoublePrecision):
        return TexDoublePrecision()
    if kind in (MixedPrecision, fabric_plugins.MixedPrecision):
        return TexMixedPrecision(known.precision, known.device, known.scaler)
    if kind in (HalfPrecision, fabric_plugins.HalfPrecision):
        return TexHalfPrecision(known.precision)
    raise refused(_unsupported(getattr(plugin, "precision", kind.__name__), kind.__name__))


def _unsupported(precision: str, plugin: str) -> str:
    return (
        f"precision={precision!r} ({plugin}) is not supported by TexMoEStrategy; legal: "
        f"{', '.join(map(repr, PRECISIONS))}"
    )
