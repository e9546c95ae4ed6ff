"""The order of a train step: the one place where it stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from lightning import Callback, LightningModule
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tex.moe import auxiliary_loss, step_is_over
from lightning_tex.optim import OptimizerStateConfig, TiledOptimizer
from lightning_tex.optim.overlap import optimizer_pass
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.flight_record import TRAINING


class TrainStep(Precision):
    """The order of a train step: closure (forward, zero_grad, backward); reduce gradients; hooks; clip; step.

    Gradients of the last layers are reduced while the closure's backward still runs, if nothing comes in between.
    Of gradients it speaks to the optimizer only: ``backward_begins``, ``backward_ended``, ``reduce_gradients``,
    ``unscale``, clipping, ``step`` (:class:`~lightning_tex.optim.TiledOptimizer`).
    """

    _step_follows = False  # the next backward is the last of its step
    _told: Sequence[TiledOptimizer] = ()  # of the backward that is under way

    def state_config(self, wanted: OptimizerStateConfig) -> OptimizerStateConfig:
        """How the optimizer keeps its states under this precision.

        Raises:
            ValueError: a format that is not made for it.
        """
        if wanted.optimizer_state_format != "fp32":
            raise UserValueError(
                f"optimizer_state_format={wanted.optimizer_state_format!r} is made for bf16 parameters, and "
                f"precision={self.precision!r} has none; legal: 'fp32', or precision='bf16-mixed' or 'bf16-true'"
            )
        return wanted

    def pre_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:  # type: ignore[override]
        """Add the auxiliary losses nobody collected, divided by the accumulation as Lightning divides the loss."""
        if module.automatic_optimization:
            tensor = tensor + auxiliary_loss(module) / module.trainer.accumulate_grad_batches
        if _strategy(module).tiled_optimizers:
            _strategy(module).spikes.add(tensor)
            TRAINING.layer = "the backward"
        self._told = reached(_strategy(module).tiled_optimizers)
        for optimizer in self._told:
            optimizer.backward_begins(tensor, self._step_follows, undisturbed=self._may_overlap(module))
        return super().pre_backward(tensor, module)

    def post_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:  # type: ignore[override]
        """Send the gradients at once, where they are not kept."""
        told, self._told = self._told, []
        for optimizer in told:
            optimizer.backward_ended()
        return super().post_backward(tensor, module)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizer, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        if not isinstance(optimizer, TiledOptimizer):  # configure_optimizers returned None
            return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)
        with self._last_backward_of_a_step(model):
            result = closure()
        if _strategy(model).spikes.leaves_out(optimizer):
            step_is_over(model, taken=False)
            return result
        TRAINING.layer = "the optimizer's step"
        hooks = partial(self._after_closure, model, optimizer)
        self.take_step(optimizer, model, hooks, whole=self._looked_at(model), **kwargs)
        TRAINING.layer = ""
        return result

    def take_step(
        self,
        optimizer: TiledOptimizer,
        model: nn.Module,
        hooks: Callable[[], None] | None = None,
        whole: bool = False,
        **kwargs: Any,
    ) -> None:
        """Step, once the backwards are over; collective.

        Args:
            optimizer, model: what is stepped, and whose routers act after it.
            hooks: what happens between reduction and step, such as clipping.
            whole: hooks see the combined gradients, not only a rank's shard of them.
            kwargs: of the step.
        """
        optimizer.reduce_gradients(whole=whole)
        self._unscale(optimizer)
        if hooks is not None:
            hooks()
        self._step(optimizer, **kwargs)
        with optimizer_pass(optimizer.world):
            step_is_over(model)

    def clipped_by_norm(self, optimizer: TiledOptimizer, max_norm: float) -> Tensor:
        """Clip, once the backwards are over. Returns the norm before; collective."""
        self._unscale(optimizer)
        return optimizer.clip_by_norm(max_norm)

    def scaled(self, loss: Tensor) -> Tensor:
        """A loss as its backward begins with it."""
        return loss

    @contextmanager
    def _last_backward_of_a_step(self, model: LightningModule) -> Iterator[None]:
        """Inside runs the closure of a step: its backward is the last one, if Lightning does it."""
        self._step_follows = model.automatic_optimization
        try:
            yield
        finally:
            self._step_follows = False

    def _unscale(self, optimizer: TiledOptimizer) -> None:
        """Take the loss scale out of the gradients, if there is one."""

    def _step(self, optimizer: TiledOptimizer, **kwargs: Any) -> None:
        optimizer.step(**kwargs)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        if isinstance(optimizer, TiledOptimizer):  # or configure_optimizers returned None
            optimizer.clip_by_norm(clip_val)

    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        if isinstance(optimizer, TiledOptimizer):
            optimizer.clip_by_value(clip_val)

    def _may_overlap(self, model: LightningModule) -> bool:
        """Whether the closure's backward is all that happens to gradients before they are reduced."""
        if not model.automatic_optimization or is_overridden("backward", model):
            return False
        hook = "on_after_backward"
        return not (is_overridden(hook, model) or any(is_overridden(hook, c, Callback) for c in _callbacks(model)))

    def _looked_at(self, model: LightningModule) -> bool:
        """Whether a hook may look at gradients: then they are whole on every rank, not only in its shard."""
        hook = "on_before_optimizer_step"
        overridden = is_overridden(hook, model) or is_overridden("configure_gradient_clipping", model)
        return overridden or any(is_overridden(hook, c, Callback) for c in _callbacks(model))


def reached(optimizers: Sequence[TiledOptimizer]) -> list[TiledOptimizer]:
    """Whose parameters a backward may reach: of several not those that ``toggle_optimizer`` has switched off."""
    if len(optimizers) == 1:
        return list(optimizers)
    return [o for o in optimizers if any(p.requires_grad for group in o.param_groups for p in group["params"])]


def _strategy(model: LightningModule) -> Any:
    """A TexMoEStrategy, which imports this module."""
    return model.trainer.strategy


def _callbacks(model: LightningModule) -> list[Any]:
    return model.trainer.callbacks  # type: ignore[attr-defined]
