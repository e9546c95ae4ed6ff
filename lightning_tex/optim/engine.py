"""The user's optimizer, driven through its own ``step`` on one window of elements at a time."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_tex.optim.formats import StateFormat, Window
from lightning_tex.optim.skipping import DeviceFactor

# Classes whose fused kernel exists on CPU and CUDA; torch picks the slow loop on CPU when nothing is said.
_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)


class Engine:
    """Steps windows with the class, options and arithmetic of a user's optimizer.

    Args:
        optimizer: the user's optimizer; it is neither stepped nor changed.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        clone = object.__new__(type(optimizer))
        clone.__dict__.update(optimizer.__dict__)
        # A scheduler patches the instance's step, users hook theirs; both belong to the whole step, not to windows.
        clone.__dict__.pop("step", None)
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            clone.__dict__[hooks] = OrderedDict()
        clone.state = defaultdict(dict)
        clone.param_groups = []
        self.optimizer = clone
        step = type(optimizer).step
        # torch wraps it to call hooks, the global ones too, which belong to the whole step.
        self._step = step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]

    def step(self, window: Window, gradient: Tensor, options: dict[str, Any]) -> None:
        """Update a window's tile and state in place by a group's options. ``gradient``: [n]."""
        tile, state = window
        tile.grad = gradient
        del gradient
        self.optimizer.state = defaultdict(dict, {tile: state})
        self.optimizer.param_groups = [{**options, "params": [tile]}]
        self._step(self.optimizer)
        tile.grad = None
        if (left := self.optimizer.state[tile]) is not state:
            state.clear()
            state.update(left)
        # Else the window would live on while the next one is put together.
        self.optimizer.state, self.optimizer.param_groups = defaultdict(dict), []

    def step_window(
        self, states: StateFormat, i: int, gradient: Tensor, scale: float | DeviceFactor, options: dict[str, Any]
    ) -> None:
        """Update window ``i``: upcast the gradient, times ``scale``, step, and let the parameters follow.

        The gradient is used up. [n]
        """
        with states.window(i) as window:
            # No name for the upcast one: it is gone when the window is taken apart.
            self.step(window, self._scaled(gradient.to(window.tile.dtype), scale), options)

    def _scaled(self, gradient: Tensor, scale: float | DeviceFactor) -> Tensor:
        if not isinstance(scale, DeviceFactor):
            return gradient if scale == 1 else gradient.mul_(scale)
        if gradient.dtype == torch.float64:  # for which the kernel's fp32 is not enough
            return gradient.mul_(scale.factor)
        self.optimizer.grad_scale = scale.inverse  # type: ignore[attr-defined]
        return gradient

    # --- steps that the device decides upon

    def leaves_out(self, states: StateFormat, group: dict[str, Any]) -> bool:
        """Whether the optimizer's kernel itself leaves out what :meth:`leaving_out` says."""
        options = fastest(self.optimizer, group)
        if type(self.optimizer) not in _FUSED or not options.get("fused"):
            return False
        # The kernel leaves a momentum that it has just been given memory for as that memory was.
        return not options.get("momentum") or all(
            "momentum_buffer" in states.saved_states(i) for i in range(len(states.spans))
        )

    @contextmanager
    def leaving_out(self, left_out: Tensor | None) -> Iterator[None]:
        """Inside, steps change nothing where the device has a 1 here, and multiply gradients by device factors.

        Args:
            left_out: an fp32 scalar; ``None``: all are taken.
        """
        self.optimizer.found_inf = left_out  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for name in ("found_inf", "grad_scale"):
                self.optimizer.__dict__.pop(name, None)


def fastest(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """The group's options without its parameters, with the fused kernel chosen where the user left the choice open."""
    options = {key: value for key, value in group.items() if key != "params"}
    unset = options.get("fused") is None and options.get("foreach") is None
    special = options.get("differentiable") or options.get("capturable")
    if type(optimizer) in _FUSED and unset and not special and not isinstance(options.get("lr"), Tensor):
        options["fused"] = True
    return options
