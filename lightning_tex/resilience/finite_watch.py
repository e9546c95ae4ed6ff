"""Where in a step the first infinity or NaN arises: flags of what modules give, kept on their device until asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_tex.parallel.flight_record import TRAINING
from lightning_tex.parallel.replay import recomputing
from lightning_tex.parallel.topology import Axis

# What a module is about to compute by itself, without others: its input -> (what, tensor).
LocalResults = Callable[[nn.Module, tuple[Any, ...]], Iterable[tuple[str, Tensor]]]


class Seen(NamedTuple):
    """A tensor that was looked at.

    Args:
        what: in words.
        module: the name of the module that gave it.
        finite: a scalar on its device.
    """

    what: str
    module: str
    finite: Tensor


@dataclass(frozen=True)
class Arisen:
    """The first infinity or NaN that a rank has seen in a step.

    Args:
        order: how many tensors it looked at before; as modules run alike, ranks' orders can be compared.
        what: in words.
        module: the name of the module that gave it.
    """

    order: int
    what: str
    module: str


class FiniteWatch:
    """Looks at all that modules give, forward and backward, as long as it is installed.

    Nothing waits for the device before :meth:`first`.

    Args:
        root: the model.
        local_results: further tensors of a module's, from its input.

    Attributes:
        seen: in this step, in order.
    """

    def __init__(self, root: nn.Module, local_results: LocalResults) -> None:
        self._names = {module: name for name, module in root.named_modules()}
        self._root = root
        self._local_results = local_results
        self._handles: list[RemovableHandle] = []
        self.seen: list[Seen] = []

    def install(self) -> None:
        """Look from now on."""
        if self._handles:
            return
        for module, name in self._names.items():
            self._handles += [
                module.register_forward_pre_hook(partial(self._before, name)),
                module.register_forward_hook(partial(self._after, name)),
            ]
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    note = partial(self._note, f"gradient of {own}", name)
                    self._handles.append(parameter.register_hook(note))

    def remove(self) -> None:
        """Look no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()

    def clear(self) -> None:
        """A step begins."""
        self.seen = []

    def first(self, seen: Sequence[Seen]) -> Arisen | None:
        """The first tensor of a step that was not finite; waits for the device."""
        if not seen:
            return None
        flags = torch.stack([tensor.finite for tensor in seen]).tolist()
        for order, (finite, (what, module, _)) in enumerate(zip(flags, seen, strict=True)):
            if not finite:
                kind = type(self._root.get_submodule(module)).__name__
                return Arisen(order, f"{what} of {module or 'the model'} ({kind})", module)
        return None

    def _before(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not recomputing():
            with torch.no_grad():
                for what, tensor in self._local_results(module, inputs):
                    self._note(what, name, tensor)

    def _after(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if recomputing():
            return
        for field, tensor in tensors_in(output):
            self._note(field or "output", name, tensor.detach(), masked=True)
            if tensor.requires_grad:
                tensor.register_hook(partial(self._note, f"gradient at the {field or 'output'}", name))

    def _note(self, what: str, module: str, tensor: Tensor, masked: bool = False) -> None:
        # Logits of minus infinity mask something out: padding of a vocabulary, experts.
        bad = tensor.isnan() | tensor.isposinf() if masked else ~tensor.isfinite()
        self.seen.append(Seen(what, module, ~bad.any()))


def tensors_in(value: Any, field: str = "") -> Iterator[tuple[str, Tensor]]:
    """Floating-point tensors in nested containers, with the name of the named tuple's or mapping's field."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield field, value
    elif isinstance(value, Mapping):
        for key, inside in value.items():
            yield from tensors_in(inside, str(key))
    elif isinstance(value, (list, tuple)):
        fields = getattr(value, "_fields", ("",) * len(value))
        for key, inside in zip(fields, value, strict=True):
            yield from tensors_in(inside, key or field)


def of_all_ranks(value: Any, world: Axis) -> list[Any]:
    """Every rank's small object, by rank; collective."""
    if world.size == 1:
        return [value]
    values = [None] * world.size
    with TRAINING.inside("all_gather of an object", world):
        dist.all_gather_object(values, value, group=world.group)
    return values
