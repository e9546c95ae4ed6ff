"""Parameters come from their owners while the next forward already runs."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_tex.optim.awaited import arrive, can_be_awaited, make_awaited, make_plain
from lightning_tex.optim.flat import FlatBuffer
from lightning_tex.parallel.in_place_collectives import Started


class ForwardOverlap:
    """Starts to gather the parameters of each buffer as soon as they are stepped, and waits where they are first read.

    The mirror image of :class:`~lightning_tex.optim.overlap.BucketOverlap`. Buffers start in the order of the step,
    group by group in that of the model, as a forward needs them. A module waits for the parameters that it holds before
    its forward; any other operation on a parameter waits as well (:mod:`~lightning_tex.optim.awaited`), so that nobody
    sees one that is not whole. Until a model is attended, the step itself waits for all.
    """

    def __init__(self) -> None:
        self._under_way: dict[FlatBuffer, Started] = {}
        self._modules: list[nn.Module] = []
        self._hooks: list[RemovableHandle] = []

    @property
    def under_way(self) -> list[FlatBuffer]:
        """Buffers that nobody has waited for, in the order in which they were started."""
        return list(self._under_way)

    def attend(self, model: nn.Module) -> None:
        """From now on leave the waiting to the forwards of a model's modules."""
        self._modules = list(model.modules())
        self._hooks += [
            module.register_forward_pre_hook(_wait_for_own)
            for module in self._modules
            if any(True for _ in module.parameters(recurse=False))
        ]

    def release(self) -> None:
        """Wait for all, and take the hooks from the modules."""
        self.wait_for_all()
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._modules = [], []

    def start(self, buffer: FlatBuffer) -> None:
        """Gather a buffer that has been stepped; collective."""
        self._under_way[buffer] = buffer.gather()

    def step_is_over(self) -> None:
        """Leave to the next forward what it can wait for, and wait for the rest."""
        deferred = bool(self._modules) and not any(map(_is_compiled, self._modules))
        for buffer in self.under_way:
            parameters = [entry.parameter for entry in buffer.entries]
            if deferred and buffer.owners.size > 1 and all(map(can_be_awaited, parameters)):
                for parameter in parameters:
                    make_awaited(parameter, partial(self.wait_for, buffer))
            else:
                self.wait_for(buffer)

    def wait_for(self, buffer: FlatBuffer) -> None:
        """Return when its parameters may be read."""
        self._under_way[buffer].wait()
        del self._under_way[buffer]
        for entry in buffer.entries:
            make_plain(entry.parameter)

    def wait_for_all(self) -> None:
        """Return when all parameters may be read and written."""
        for buffer in self.under_way:
            self.wait_for(buffer)


def _wait_for_own(module: nn.Module, _: object) -> None:
    """Before a forward: operators outside torch, such as kernels of extensions, get parameters that are whole."""
    for parameter in module._parameters.values():
        arrive(parameter)


def _is_compiled(module: nn.Module) -> bool:
    """By ``torch.compile``, which is not to see parameters change their class."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules
