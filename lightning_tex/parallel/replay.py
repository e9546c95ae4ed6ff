"""What a collective's result passes through: tapes that keep it for a recomputation, and the byte meter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from lightning_tex.parallel.byte_meter import Sent
from lightning_tex.parallel.topology import Axis


class Tape(ABC):
    """What a recomputed block keeps of its collectives; ``activation_checkpointing`` has the one that exists."""

    replaying: bool
    recomputing: bool = False

    @abstractmethod
    def record(self, key: str, result: Tensor) -> None:
        """Keep what a collective gave."""

    @abstractmethod
    def next(self, key: str) -> Tensor:
        """What the same collective gave in the first forward."""


# The tapes of the blocks that are being run, outermost first.
active_tapes: ContextVar[tuple[Tape, ...]] = ContextVar("active_tapes", default=())
_inside: ContextVar[bool] = ContextVar("_inside", default=False)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Collectives inside are on no tape: a recomputation does not come here."""
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)


def recorded(name: str, like: Tensor, run: Callable[[], Tensor]) -> Tensor:
    """``run()``, or what it gave in the first forward of the block that is being recomputed.

    Collectives inside ``run`` are not recorded one by one: only what comes out at the end takes memory.

    Args:
        name: operation and axis; with the input's shape and dtype it is compared at the replay.
        like: the input.
        run: what communicates.
    """
    tapes = active_tapes.get()
    if not tapes or _inside.get():
        return run()
    key = f"{name} of {like.dtype} {tuple(like.shape)}"
    player = next((tape for tape in tapes if tape.replaying), None)
    if player is not None:
        result = player.next(key)
    else:
        with unrecorded():
            result = run()
    for tape in tapes:
        if not tape.replaying:
            tape.record(key, result)
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, computed: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        kind = x.device.type
        ctx.autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        # A product over no columns is zeros of the right shape and dtype.
        return x @ weight.mT if computed else x[..., :0] @ weight[..., :0].mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        with ctx.autocast:
            d_weight = None
            if ctx.needs_input_grad[1]:
                columns, rows = (grad, x) if weight.dim() == x.dim() else (grad.flatten(0, -2), x.flatten(0, -2))
                d_weight = columns.mT @ rows
            return grad @ weight, d_weight, None


def product_to_record(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.mT`` that is given to :func:`recorded` and to nothing else: [.., n, in], [.., out, in] -> [.., out].

    Where a tape replays what came of it, nobody looks at it and it is not computed.
    """
    replayed = not _inside.get() and any(tape.replaying for tape in active_tapes.get())
    return _Product.apply(x, weight, not replayed)


def current_pass() -> str:
    """``forward``, ``recompute`` or ``backward``."""
    if any(tape.recomputing for tape in active_tapes.get()):
        return "recompute"
    return "forward" if torch._C._current_graph_task_id() == -1 else "backward"


def count_sent(operation: str, axis: Axis, scaled_bytes: int) -> None:
    """Tell the axis's meter of a collective that sent ``scaled_bytes / axis.size`` bytes."""
    meter = axis.meter
    if meter is None or not meter.on:
        return
    during = "optimizer" if meter.optimizing else current_pass()
    meter.add(Sent(operation, axis.name, during), scaled_bytes, axis.size)
