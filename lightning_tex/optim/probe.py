"""What has to be known of a user's optimizer before it is driven window by window, found out by trying."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes

from lightning_tex.optim.engine import Engine, Held, fastest
from lightning_tex.optim.formats import SavedSize, StateFormat, Window, per_element
from lightning_tex.optim.walk import Walk
from lightning_tex.parallel.allocations import AllocationWatch
from lightning_tex.parallel.errors import UserValueError

_ELEMENTS = 4096


class NotElementwiseError(UserValueError):
    """An optimizer cannot be driven window by window."""


class Probed(NamedTuple):
    """What a trial showed.

    nonnegative: states that were never below zero, whatever the gradients.
    not_floating: states with one value per element that are no floating-point numbers, and their dtype.
    """

    nonnegative: frozenset[str]
    not_floating: dict[str, torch.dtype]


def probe(optimizer: Optimizer, group: dict[str, Any]) -> Probed:
    """Try an optimizer under a group's options, and refuse one whose update of an element depends on other elements.

    A random matrix stepped whole, as the user's optimizer would, and stepped in windows of its flattened elements must
    agree.

    Raises:
        NotElementwiseError: it is not elementwise, with the reason.
        ValueError: it cannot be stepped at all.
    """
    with _disable_current_modes():  # a trial is of real numbers, whatever a trace makes of the others
        return _try(optimizer, group)


def _try(optimizer: Optimizer, group: dict[str, Any]) -> Probed:
    name = type(optimizer).__name__
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(4, 16, 16, generator=generator)
    options = _on_cpu(optimizer, group)
    calls = _CountedClosure()
    try:
        engine = Engine(optimizer)
        flat = start.flatten().clone()
        windows = [Window(nn.Parameter(tile), {}) for tile in flat.split(64)]
        for gradient in gradients:
            for window, part in zip(windows, gradient.flatten().split(64), strict=True):
                engine.step([window], [part.clone()], options)
        whole = nn.Parameter(start.clone())
        reference = Engine(optimizer).optimizer
        reference.state[whole] = engine.constructed(whole, options)
        reference.param_groups = [{**options, "params": [whole]}]
        for gradient in gradients:
            whole.grad = gradient.clone()
            reference.step(*engine.no_closure)
    except Exception as error:
        _refuse_line_search(optimizer, options, calls)
        raise NotElementwiseError(
            f"optimizer {name} cannot be driven window by window ({type(error).__name__}: {error})"
        ) from error
    _refuse_line_search(optimizer, options, calls)
    windowed = torch.cat([window.tile.detach() for window in windows])
    if not torch.allclose(windowed, whole.detach().flatten(), rtol=1e-5, atol=1e-7):
        if torch.equal(whole, start):
            raise UserValueError(
                f"optimizer {name}: the class's kernel steps a random matrix, and its step() leaves it as it is; "
                "legal: a step() that steps"
            )
        raise NotElementwiseError(
            f"optimizer {name} is not elementwise: a random matrix stepped whole and in windows differ by up to "
            f"{(windowed - whole.detach().flatten()).abs().max():.1e}"
        )
    state, tile = windows[0].state, windows[0].tile
    odd = {key: v.dtype for key, v in state.items() if per_element(v, tile) and not v.is_floating_point()}
    return Probed(_nonnegative(windows), odd)


def require_separate(optimizer: Optimizer, group: dict[str, Any], reason: NotElementwiseError) -> None:
    """Refuse an optimizer, which is not elementwise, whose update of a matrix depends on others.

    Two random matrices stepped together, and each alone, must agree.

    Args:
        optimizer, group: the user's.
        reason: why it is not elementwise.

    Raises:
        ValueError: naming the optimizer and both reasons.
    """
    need = "legal: an optimizer whose update of a matrix depends on nothing but that matrix (AdamW, SGD, Muon, ..)"
    with _disable_current_modes():
        options, engine = _on_cpu(optimizer, group), Engine(optimizer)
        generator = torch.Generator().manual_seed(1)
        start, *gradients = torch.randn(4, 2, 16, 24, generator=generator)
        together, alone = ([Window(nn.Parameter(matrix.clone()), {}) for matrix in start] for _ in range(2))
        try:
            for gradient in gradients:
                engine.step(together, list(gradient.clone()), options)
                for window, part in zip(alone, gradient.clone(), strict=True):
                    engine.step([window], [part], options)
        except Exception as error:
            raise UserValueError(f"{reason}, nor matrix by matrix ({type(error).__name__}: {error}); {need}") from error
    for one, other in zip(together, alone, strict=True):
        if not torch.allclose(one.tile, other.tile, rtol=1e-5, atol=1e-7):
            raise UserValueError(f"{reason}, and its update of a matrix depends on others; {need}")


class _CountedClosure:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> Tensor:
        self.count += 1
        return torch.ones((), requires_grad=True)


def _refuse_line_search(optimizer: Optimizer, options: dict[str, Any], closure: _CountedClosure) -> None:
    """Refuse an optimizer that evaluates the loss more than once in a step."""
    engine = Engine(optimizer)
    tile = nn.Parameter(torch.ones(4))
    tile.grad = torch.ones(4)
    engine.optimizer.param_groups = [{**options, "params": [tile]}]
    if hasattr(engine.optimizer, "_params"):  # LBFGS keeps its parameters a second time
        engine.optimizer._params = [tile]
    try:
        with torch.enable_grad():
            engine.optimizer.step(closure)  # type: ignore[arg-type]
    except Exception:
        return
    if closure.count > 1:
        raise UserValueError(
            f"optimizer {type(optimizer).__name__} calls its closure {closure.count} times in one step, that is, it "
            "computes the loss again at other parameters; a step here has one forward and backward. Legal: an "
            "optimizer that calls it at most once (Adam, AdamW, SGD, Muon, ..)"
        )


def _on_cpu(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    options = fastest(optimizer, group)
    if options.get("capturable"):
        options["capturable"] = False  # asks for a GPU, and the probe needs none
    if "lr" in options:
        options["lr"] = 0 * options["lr"] + 1e-2  # a warm-up that begins at 0 would hide every difference
    return options


def _nonnegative(windows: list[Window]) -> frozenset[str]:
    signs: dict[str, bool] = {}
    for window in windows:
        for key, value in window.state.items():
            if per_element(value, window.tile):
                # What is still all zero has shown no sign.
                signs[key] = signs.get(key, True) and bool((value >= 0).all() and (value > 0).any())
    return frozenset(key for key, never_below in signs.items() if never_below)


class TriedStep(NamedTuple):
    """What steps of a window showed.

    temporary_bytes: for each element, that a step allocates and frees again, at their peak: the optimizer's own and
        ours.
    saved: what a checkpoint has of the states.
    """

    temporary_bytes: float
    saved: SavedSize


def try_steps(
    optimizer: Optimizer,
    group: dict[str, Any],
    like: Tensor,
    make_states: Callable[[Tensor, int], StateFormat],
) -> TriedStep:
    """What a step by a format takes.

    Args:
        optimizer, group: the user's optimizer and the group's options.
        like: parameters, whose dtype and device are meant.
        make_states: the state format, from own part and tile size.
    """
    with _disable_current_modes():
        return _steps_tried(optimizer, group, like.dtype, like.device, make_states)


def _steps_tried(
    optimizer: Optimizer,
    group: dict[str, Any],
    dtype: torch.dtype,
    like_device: torch.device,
    make_states: Callable[[Tensor, int], StateFormat],
) -> TriedStep:
    device = torch.device("cpu") if like_device.type == "meta" else like_device
    options = _on_cpu(optimizer, group) if device.type == "cpu" else fastest(optimizer, group)
    engine = Engine(optimizer)
    values = torch.linspace(-1, 1, _ELEMENTS, device=device).to(dtype)  # the run's random numbers are not ours
    states, gradient = make_states(values.clone(), _ELEMENTS), values
    with torch.no_grad():
        for _ in range(2):  # the first step makes the states
            walk, allocations = Walk(0.5), Allocations()
            walk.inverse(1, device)  # a scalar for all windows
            with allocations:
                engine.step_windows([Held(states, 0, gradient, 1)], walk, options)
    return TriedStep(allocations.peak_bytes / _ELEMENTS, SavedSize.of(states.saved_states(0)))


class Allocations(AllocationWatch[int]):
    """Counts the bytes of tensors that operations make, as long as these live."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak_bytes = 0

    def allocated(self, size: int) -> int:
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        return size

    def freed(self, allocation: int) -> None:
        self.bytes -= allocation
