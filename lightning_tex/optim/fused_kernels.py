"""torch's fused kernels of Adam, AdamW and SGD, called without the way through the optimizer's ``step``.

That way takes 100 microseconds and more for a window of which a CPU has just moved megabytes; the numbers are the same.
A first step, which makes the states, is left to the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_tex.optim.formats import Window


class FusedKernel(Protocol):
    """Updates windows with states by a group's options; see :meth:`Engine.step` for the arguments."""

    def __call__(
        self,
        windows: Sequence[Window],
        gradients: list[Tensor],
        options: dict[str, Any],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None: ...


def fused_kernel(optimizer: Optimizer, options: dict[str, Any], windows: Sequence[Window]) -> FusedKernel | None:
    """The kernel that the optimizer's own ``step`` would call for these windows, if it is known."""
    known = _KERNELS.get(type(optimizer))
    if known is None or not options.get("fused") or any(isinstance(value, Tensor) for value in _numbers(options)):
        return None
    kernel, needs = known
    wanted = needs(options)
    return kernel if all(isinstance(state.get(key), Tensor) for _, state in windows for key in wanted) else None


def _numbers(options: dict[str, Any]) -> list[Any]:
    return [options["lr"], *options.get("betas", ())]


def _adam(
    windows: Sequence[Window],
    gradients: list[Tensor],
    options: dict[str, Any],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    steps = [state["step"] for _, state in windows]
    torch._foreach_add_(steps, 1)
    kernel = torch._fused_adamw_ if options["decoupled_weight_decay"] else torch._fused_adam_
    beta1, beta2 = options["betas"]
    kernel(
        [tile for tile, _ in windows],
        gradients,
        [state["exp_avg"] for _, state in windows],
        [state["exp_avg_sq"] for _, state in windows],
        [state["max_exp_avg_sq"] for _, state in windows] if options["amsgrad"] else [],
        steps,
        lr=options["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=options["weight_decay"],
        eps=options["eps"],
        amsgrad=options["amsgrad"],
        maximize=options["maximize"],
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
    if found_inf is not None:
        torch._foreach_sub_(steps, len(steps) * [found_inf])


def _adam_states(options: dict[str, Any]) -> tuple[str, ...]:
    return ("step", "exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if options["amsgrad"] else ()))


def _sgd(
    windows: Sequence[Window],
    gradients: list[Tensor],
    options: dict[str, Any],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    torch._fused_sgd_(
        [tile for tile, _ in windows],
        gradients,
        [state["momentum_buffer"] for _, state in windows] if options["momentum"] else [],
        weight_decay=options["weight_decay"],
        momentum=options["momentum"],
        lr=options["lr"],
        dampening=options["dampening"],
        nesterov=options["nesterov"],
        maximize=options["maximize"],
        is_first_step=False,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )


def _sgd_states(options: dict[str, Any]) -> tuple[str, ...]:
    return ("momentum_buffer",) if options["momentum"] else ()


_KERNELS: dict[type, tuple[FusedKernel, Any]] = {
    Adam: (_adam, _adam_states),
    AdamW: (_adam, _adam_states),
    SGD: (_sgd, _sgd_states),
}
