"""The user's optimizer, driven through its own ``step`` on one window of elements at a time."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Classes whose fused kernel exists on CPU and CUDA; torch picks the slow loop on CPU when nothing is said.
_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)


class Engine:
    """Steps single tensors with the class, options and arithmetic of a user's optimizer.

    Its state lives here, keyed by the tensor, which must therefore be a persistent object.

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

    @property
    def state(self) -> defaultdict[Tensor, dict[str, Any]]:
        """State by window."""
        return self.optimizer.state

    def step(self, window: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Update ``window`` in place by the group's options. ``window`` and ``gradient``: [n]."""
        window.grad = gradient
        self.optimizer.param_groups = [{**group, "params": [window]}]
        self.optimizer.step()
        window.grad = None


def fastest(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """The group's options without its parameters, with the fused kernel chosen where the user left the choice open."""
    options = {key: value for key, value in group.items() if key != "params"}
    unset = options.get("fused") is None and options.get("foreach") is None
    special = options.get("differentiable") or options.get("capturable")
    if type(optimizer) in _FUSED and unset and not special and not isinstance(options.get("lr"), Tensor):
        options["fused"] = True
    return options


def require_elementwise(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Refuse an optimizer whose update of an element depends on other elements, under a group's options.

    Probes it: a random matrix stepped whole, as the user's optimizer would, and stepped in windows of its flattened
    elements must agree.

    Raises:
        ValueError: naming the optimizer and the reason.
    """
    name = type(optimizer).__name__
    need = "the sharded step updates windows of flat buffers and needs an elementwise one (Adam, AdamW, SGD, ..)"
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(4, 16, 16, generator=generator)
    options = fastest(optimizer, group)
    if options.get("capturable"):
        options["capturable"] = False  # asks for a GPU, and the probe needs none
    if "lr" in options:
        options["lr"] = 0 * options["lr"] + 1e-2  # a warm-up that begins at 0 would hide every difference
    try:
        engine = Engine(optimizer)
        flat = start.flatten().clone()
        windows = [nn.Parameter(window) for window in flat.split(64)]
        for gradient in gradients:
            for window, part in zip(windows, gradient.flatten().split(64), strict=True):
                engine.step(window, part.clone(), options)
        whole = nn.Parameter(start.clone())
        reference = Engine(optimizer).optimizer
        reference.param_groups = [{**options, "params": [whole]}]
        for gradient in gradients:
            whole.grad = gradient.clone()
            reference.step()
    except Exception as error:
        raise ValueError(
            f"optimizer {name} cannot be driven window by window ({type(error).__name__}: {error}); {need}"
        ) from error
    windowed = torch.cat([window.detach() for window in windows])
    if not torch.allclose(windowed, whole.detach().flatten(), rtol=1e-5, atol=1e-7):
        raise ValueError(
            f"optimizer {name} is not elementwise: a random matrix stepped whole and in windows differ by up to "
            f"{(windowed - whole.detach().flatten()).abs().max():.1e}; {need}"
        )
