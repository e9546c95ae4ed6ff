"""The user's optimizer, driven through its own ``step`` on one window of elements at a time."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_tex.optim.formats import StateFormat, Window

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

    def step_window(self, states: StateFormat, i: int, gradient: Tensor, scale: float, options: dict[str, Any]) -> None:
        """Update window ``i``: upcast the gradient, times ``scale``, step, and let the parameters follow.

        The gradient is used up. [n]
        """
        with states.window(i) as window:
            # No name for the upcast one: it is gone when the window is taken apart.
            self.step(window, _scaled(gradient.to(window.tile.dtype), scale), options)


def _scaled(gradient: Tensor, scale: float) -> Tensor:
    return gradient if scale == 1 else gradient.mul_(scale)


def fastest(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """The group's options without its parameters, with the fused kernel chosen where the user left the choice open."""
    options = {key: value for key, value in group.items() if key != "params"}
    unset = options.get("fused") is None and options.get("foreach") is None
    special = options.get("differentiable") or options.get("capturable")
    if type(optimizer) in _FUSED and unset and not special and not isinstance(options.get("lr"), Tensor):
        options["fused"] = True
    return options
