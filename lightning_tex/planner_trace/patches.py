"""Everything that a trace changes from outside so that a real run goes through without values and without others.

Five changes, undone or gone when the trace ends:

- :func:`torch.nn.Module._apply`: ``module.to(..)`` sets ``.data``. Of parameters without values torch makes new ones
  and swaps them, which fails where anything refers to the old ones.
- ``strategy.broadcast`` gives back what it is given: nobody else has sent anything.
- ``strategy._agreement`` is that of one rank: nobody else has anything else.
- ``trainer._data_connector.prepare_data`` prepares without a gloo group in which to wait for the others.
- :func:`~lightning_tex.parallel.device.pretend_device`: what differs by device takes the pretended one's code path.

Beside these, :mod:`~lightning_tex.planner_trace.world` joins torch's fake process group. Two rooms that train know that
parameters may have no values: ``MeshStrategy.teardown`` moves none of them, and ``optim.probe`` measures an optimizer's
kernels outside of the modes that take values away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning import Trainer
from torch import Tensor, nn

from lightning_tex.parallel.device import pretend_device
from lightning_tex.resilience.agreement import Agreement


@contextmanager
def patched_for_a_trace(device: Literal["cpu", "cuda"]) -> Iterator[None]:
    """What is patched of torch and of this package, inside.

    Args:
        device: the pretended one.
    """
    before = nn.Module._apply
    nn.Module._apply = _apply_in_place  # type: ignore[method-assign]
    try:
        with pretend_device(device):
            yield
    finally:
        nn.Module._apply = before  # type: ignore[method-assign]


def patch_trainer(trainer: Trainer) -> None:
    """What is patched of a Trainer and its strategy, which live no longer than the trace."""
    trainer.strategy.broadcast = _broadcast  # type: ignore[method-assign]
    trainer.strategy._agreement = _alone  # type: ignore[attr-defined]
    trainer._data_connector.prepare_data = partial(_prepare_data, trainer)  # type: ignore[method-assign]


def _apply_in_place(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    for child in self.children() if recurse else ():
        child._apply(fn)
    with torch.no_grad():
        for parameter in self.parameters(recurse=False):
            applied = fn(parameter)
            if applied is not parameter:
                parameter.data = applied
        for name, buffer in self.named_buffers(recurse=False):
            setattr(self, name, fn(buffer))
    return self


def _broadcast(obj: Any, src: int = 0) -> Any:
    return obj


def _alone(ranks: object, name: str, timeout: object = None) -> Agreement:
    return Agreement(dist.HashStore(), 0, (0,), timedelta(0), name)


def _prepare_data(trainer: Trainer) -> None:
    for prepared in (trainer.datamodule, trainer.lightning_module):  # type: ignore[attr-defined]
        if prepared is not None:
            prepared.prepare_data()
