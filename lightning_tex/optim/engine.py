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
from lightning_tex.parallel.device import device_type

# Classes with a fused kernel; torch picks the slow loop on CPU when nothing is said. Adagrad has none on GPUs before
# torch 2.12.
_FUSED_ANYWHERE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
_FUSED_ON_CPU = (*_FUSED_ANYWHERE, torch.optim.Adagrad)


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
        # fp32, in which a kernel takes its factor, is not enough for fp64.
        by_kernel = isinstance(scale, DeviceFactor) and gradient.dtype != torch.float64
        self.optimizer.grad_scale = scale.inverse if by_kernel else None  # type: ignore[attr-defined, union-attr]
        if by_kernel or scale == 1:
            return gradient
        return gradient.mul_(scale.factor if isinstance(scale, DeviceFactor) else scale)

    # --- steps that the device decides upon

    def leaves_out(self, states: StateFormat, group: dict[str, Any]) -> bool:
        """Whether the optimizer's kernel itself leaves out what :meth:`leaving_out` says."""
        options = fastest(self.optimizer, group)
        if type(self.optimizer) not in _FUSED_ANYWHERE or not options.get("fused"):
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
            self.optimizer.found_inf = None  # type: ignore[attr-defined]


def fastest(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """The group's options without its parameters, with the fused kernel chosen where the user left the choice open."""
    options = {key: value for key, value in group.items() if key != "params"}
    unset = options.get("fused") is None and options.get("foreach") is None
    special = options.get("differentiable") or options.get("capturable")
    on_cpu = all(device_type(parameter) != "cuda" for parameter in group.get("params", ())[:1])
    has_kernel = type(optimizer) in (_FUSED_ON_CPU if on_cpu else _FUSED_ANYWHERE)
    if has_kernel and unset and not special and not isinstance(options.get("lr"), Tensor):
        options["fused"] = True
    return options
