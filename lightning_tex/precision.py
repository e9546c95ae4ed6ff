"""Precision plugins: what is stored in which dtype, and the order of a train step, in one place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.plugins import DoublePrecision, MixedPrecision, Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tex.moe.losses import auxiliary_loss
from lightning_tex.moe.router import Router
from lightning_tex.optim import TiledOptimizer

_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
)


class _TrainStep(Precision):
    """The order of a train step: closure (forward, zero_grad, backward); reduce gradients; hooks; clip; step.

    Gradients of the last layers are reduced while the closure's backward still runs, if nothing comes in between.
    """

    def pre_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:  # type: ignore[override]
        """Add the auxiliary losses nobody collected, divided by the accumulation as Lightning divides the loss."""
        if module.automatic_optimization:
            tensor = tensor + auxiliary_loss(module) / module.trainer.accumulate_grad_batches
        for optimizer in module.trainer.strategy.optimizers:
            if isinstance(optimizer, TiledOptimizer):
                optimizer.look_at(tensor)
        return super().pre_backward(tensor, module)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizer, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        if not isinstance(optimizer, TiledOptimizer):  # configure_optimizers returned None
            return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)
        with optimizer.overlapping() if self._may_overlap(model) else nullcontext():
            result = closure()
        optimizer.reduce_gradients(whole=self._looked_at(model))
        self._after_closure(model, optimizer)
        optimizer.step(**kwargs)
        return result

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        if isinstance(optimizer, TiledOptimizer):  # or configure_optimizers returned None
            optimizer.clip_by_norm(clip_val)

    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        if isinstance(optimizer, TiledOptimizer):
            optimizer.clip_by_value(clip_val)

    def _may_overlap(self, model: LightningModule) -> bool:
        """Whether the closure's backward is all that happens to gradients before they are reduced."""
        from lightning import Callback

        if not model.automatic_optimization or is_overridden("backward", model):
            return False
        hook = "on_after_backward"
        return not (is_overridden(hook, model) or any(is_overridden(hook, c, Callback) for c in _callbacks(model)))

    def _looked_at(self, model: LightningModule) -> bool:
        """Whether a hook may look at gradients: then they are whole on every rank, not only in its shard."""
        from lightning import Callback

        hook = "on_before_optimizer_step"
        overridden = is_overridden(hook, model) or is_overridden("configure_gradient_clipping", model)
        return overridden or any(is_overridden(hook, c, Callback) for c in _callbacks(model))


def _callbacks(model: LightningModule) -> list[Any]:
    return model.trainer.callbacks  # type: ignore[attr-defined]


class TexPrecision(_TrainStep):
    """``32-true``: everything in fp32."""


class TexDoublePrecision(_TrainStep, DoublePrecision):
    """``64-true``: everything in fp64."""


class TexMixedPrecision(_TrainStep, MixedPrecision):  # type: ignore[misc]
    """``bf16-mixed``: bf16 parameters with fp32 masters in the optimizer, autocast active; routers and norms fp32.

    This differs from Lightning's own meaning (fp32 parameters, autocast only): parameters take half the memory.
    """

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Cast floating parameters to bf16, except those of routers and norms."""
        for part in module.modules():
            if not isinstance(part, (Router, *_NORMS)):
                for parameter in part.parameters(recurse=False):
                    if parameter.is_floating_point():
                        parameter.data = parameter.data.to(torch.bfloat16)
        return module


def tex_precision(plugin: Precision) -> Precision:
    """The plugin of ours that does what Lightning's would, on the strategy's train step.

    Raises:
        MisconfigurationException: a precision that the strategy does not support, by name.
    """
    if isinstance(plugin, _TrainStep):
        return plugin
    if type(plugin) is Precision:
        return TexPrecision()
    if type(plugin) is DoublePrecision:
        return TexDoublePrecision()
    if type(plugin) is MixedPrecision and plugin.precision == "bf16-mixed":
        return TexMixedPrecision("bf16-mixed", plugin.device)
    raise MisconfigurationException(
        f"precision={getattr(plugin, 'precision', type(plugin).__name__)!r} ({type(plugin).__name__}) is not supported "
        "by TexMoEStrategy; legal: '32-true', '64-true', 'bf16-mixed'"
    )
