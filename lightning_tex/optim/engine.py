"""The user's optimizer, driven through its own ``step`` on one window of elements at a time."""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_tex.optim.formats import StateFormat, Window
from lightning_tex.optim.fused_kernels import fused_kernel
from lightning_tex.optim.walk import Walk
from lightning_tex.parallel.device import device_type

# Classes with a fused kernel; torch picks the slow loop on CPU when nothing is said. Adagrad has none on GPUs before
# torch 2.12.
_FUSED_ANYWHERE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
_FUSED_ON_CPU = (*_FUSED_ANYWHERE, torch.optim.Adagrad)


class Held(NamedTuple):
    """A window of some shard's states, and the gradient that it is stepped by, still to be divided. [n]"""

    states: StateFormat
    place: int
    gradient: Tensor
    divisor: float


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
        # As Adagrad's does, and before torch 2.13 nothing else.
        self._constructor_makes_states = any(optimizer.state.values())
        clone.state = defaultdict(dict)
        clone.param_groups = []
        self.optimizer = clone
        step = type(optimizer).step
        # torch wraps it to call hooks, the global ones too, which belong to the whole step.
        self._step = step.__wrapped__ if getattr(step, "hooked", None) is True else step  # type: ignore[attr-defined]
        _, *arguments = inspect.signature(self._step).parameters.values()
        # What `step` is called with, which calls no closure: some classes have no default for it.
        self.no_closure = (None,) * sum(argument.default is argument.empty for argument in arguments[:1])

    def step(
        self,
        windows: Sequence[Window],
        gradients: list[Tensor],
        options: dict[str, Any],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Update the tiles and states of windows in place by a group's options, all in one call.

        Args:
            windows, gradients: what is stepped. [n] each
            options: of the group.
            grad_scale, found_inf: for fused kernels, as torch's own loss scaler hands them over: what gradients are
                divided by, and whether everything stays as it is.
        """
        kernel = fused_kernel(self.optimizer, options, windows)
        if kernel is not None:
            kernel(windows, gradients, options, grad_scale, found_inf)
            return
        tiles = [window.tile for window in windows]
        for tile, gradient in zip(tiles, gradients, strict=True):
            tile.grad = gradient
        del gradients, gradient
        for tile, state in windows:
            if not state:
                state.update(self.constructed(tile, options))
        optimizer = self.optimizer
        optimizer.grad_scale, optimizer.found_inf = grad_scale, found_inf  # type: ignore[attr-defined]
        optimizer.state = defaultdict(dict, {window.tile: window.state for window in windows})
        optimizer.param_groups = [{**options, "params": tiles}]
        self._step(optimizer, *self.no_closure)
        for tile, state in windows:
            tile.grad = None
            if (left := optimizer.state[tile]) is not state:
                state.clear()
                state.update(left)
        # Else the windows would live on while the next ones are put together.
        optimizer.state, optimizer.param_groups = defaultdict(dict), []

    def constructed(self, tile: Tensor, options: dict[str, Any]) -> dict[str, Any]:
        """The states that the optimizer's constructor makes for a parameter, by a group's options."""
        if not self._constructor_makes_states:
            return {}
        known = inspect.signature(type(self.optimizer)).parameters
        fresh = type(self.optimizer)([tile], **{name: value for name, value in options.items() if name in known})
        return fresh.state[tile]

    def step_windows(self, held: Sequence[Held], walk: Walk, options: dict[str, Any]) -> None:
        """Update windows of one dtype: upcast their gradients, scale, step, and let the parameters follow.

        The gradients may be used up.
        """
        divisor = held[0].divisor
        with ExitStack() as windows_open:
            windows = [windows_open.enter_context(each.states.window(each.place, walk)) for each in held]
            dtype = windows[0].tile.dtype
            options = self._working(options, windows[0].tile)
            kernel_scales = options.get("fused") and type(self.optimizer) in _FUSED_ON_CPU
            gradients = walk.upcast([each.gradient for each in held], dtype)
            inverse = None
            if kernel_scales and dtype != torch.float64:  # of which fp32 scales would take the precision
                inverse = walk.inverse(divisor, gradients[0].device)
            else:
                walk.scale_in_place(gradients, divisor)
            self.step(windows, gradients, options, inverse, walk.skip)
            del windows, gradients
            if not held[0].states.in_place:
                walk.free()  # windows that are taken apart need room for that
        walk.make_copies()

    def _working(self, options: dict[str, Any], tile: Tensor) -> dict[str, Any]:
        """The options, but for a kernel of torch that leaves tiles of the kind as they are.

        On CPUs that of SGD changes nothing of 16-bit numbers but what its vectors leave over (torch 2.11 to 2.13).
        """
        broken = type(self.optimizer) is torch.optim.SGD and tile.dtype.itemsize == 2 and device_type(tile) == "cpu"
        return {**options, "fused": False} if broken else options

    def leaves_out(self, states: StateFormat, group: dict[str, Any]) -> bool:
        """Whether the optimizer's kernel itself leaves out a step that a scalar on the device says is not taken."""
        options = fastest(self.optimizer, group)
        if type(self.optimizer) not in _FUSED_ANYWHERE or not options.get("fused"):
            return False
        # The kernel leaves a momentum that it has just been given memory for as that memory was.
        return not options.get("momentum") or all(
            "momentum_buffer" in states.saved_states(i) for i in range(len(states.spans))
        )


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
