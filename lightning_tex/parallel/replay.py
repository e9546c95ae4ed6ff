"""What a recomputation takes from a tape: decisions always, results of collectives where it is communication-aware.

This room holds the only state that is not handed in: the tapes of the blocks that are being run in this thread. A
block's tape is put there while its forward runs, first or again (``activation_checkpointing``). Whatever a forward
communicates passes :func:`replayable` (paper section 5.2), what it decides by values passes :func:`decided`, and what
is counted asks :func:`current_pass`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from lightning_tex.parallel.byte_meter import Sent
from lightning_tex.parallel.topology import Axis

Decision = TypeVar("Decision")


class Tape(ABC):
    """What a recomputed block keeps of its first forward; ``activation_checkpointing`` has the one that exists.

    ``recomputing``: the block's forward runs again, and decisions are read. ``replaying``: and results of collectives.
    """

    replaying: bool = False
    recomputing: bool = False

    @abstractmethod
    def record(self, key: str, result: Tensor) -> None:
        """Keep what a collective gave."""

    @abstractmethod
    def next(self, key: str) -> Tensor:
        """What the same collective gave in the first forward."""

    @abstractmethod
    def keep(self, name: str, decision: Any) -> None:
        """Keep what was decided."""

    @abstractmethod
    def kept(self, name: str) -> Any:
        """What the same decision was in the first forward."""


# The tapes of the blocks that are being run, outermost first, and whether collectives are off the tapes.
running_tapes: ContextVar[tuple[Tape, ...]] = ContextVar("running_tapes", default=())
_outside: ContextVar[bool] = ContextVar("_outside", default=False)


def _player() -> Tape | None:
    """The tape that gives results again, if one does."""
    return None if _outside.get() else next((tape for tape in running_tapes.get() if tape.replaying), None)


def replaying() -> bool:
    """Whether what :func:`replayable` gives now comes from a tape."""
    return _player() is not None


@contextmanager
def outside_replay() -> Iterator[None]:
    """Collectives inside are on no tape: a recomputation does not come here."""
    token = _outside.set(True)
    try:
        yield
    finally:
        _outside.reset(token)


def replayable(name: str, like: Tensor, run: Callable[[], Tensor]) -> Tensor:
    """``run()``, or what it gave in the first forward of the block that is being recomputed.

    Collectives inside ``run`` are not recorded one by one: only what comes out at the end takes memory.

    Args:
        name: operation and axis; with the input's shape and dtype it is compared at the replay.
        like: the input.
        run: what communicates.
    """
    tapes = running_tapes.get()
    if not tapes or _outside.get():
        return run()
    key = f"{name} of {like.dtype} {tuple(like.shape)}"
    player = _player()
    if player is not None:
        result = player.next(key)
    else:
        with outside_replay():
            result = run()
    for tape in tapes:
        if not tape.replaying:
            tape.record(key, result)
    return result


def decided(name: str, decide: Callable[[], Decision]) -> Decision:
    """``decide()``, or what it gave in the first forward of the block that is being recomputed.

    In every mode of recomputation: what two passes decide differently would give one pass's rows the other's places,
    and send what nobody waits for. Collectives inside ``decide`` are not repeated.

    Args:
        name: compared when it is asked for again.
        decide: gives any object that nobody changes; what it holds of tensors has no gradient.
    """
    tapes = running_tapes.get()
    if not tapes or _outside.get():
        return decide()
    decision: Decision
    player = next((tape for tape in tapes if tape.recomputing), None)
    if player is not None:
        decision = player.kept(name)
    else:
        with outside_replay():
            decision = decide()
    for tape in tapes:
        if not tape.recomputing:
            tape.keep(name, decision)
    return decision


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


def products_then(
    products: Iterable[tuple[Tensor, Tensor]], communicate: Callable[[Tensor], Tensor]
) -> Tensor:  # [.., n, in], [.., out, in] -> what communicate makes of [.., n, out]
    """``communicate`` of ``x @ weight.mT``, summed over several (x, weight).

    One operation, because what lies between is nobody's: partial sums, which a recomputation that replays the result of
    ``communicate`` does not compute.

    Args:
        products: pairs of x and weight, taken one by one.
        communicate: passes its argument to :func:`replayable` and looks at nothing of it but shape and dtype.
    """
    first, *others = (_Product.apply(x, weight, not replaying()) for x, weight in products)
    return communicate(sum(others, first))


def recomputing() -> bool:
    """Whether a layer's forward is one that ran before, repeated in a backward."""
    return current_pass() != "forward"


def current_pass() -> Literal["forward", "recompute", "backward"]:
    """What is being run. Outside of blocks with a tape, a forward inside a backward counts as ``backward``."""
    if torch._C._current_graph_task_id() == -1:
        return "forward"
    return "recompute" if any(tape.recomputing for tape in running_tapes.get()) else "backward"


def count_sent(operation: str, axis: Axis, scaled_bytes: int) -> None:
    """Tell the axis's meter of a collective that sent ``scaled_bytes / axis.size`` bytes."""
    if axis.meter is not None and axis.meter.counting:
        axis.meter.add(Sent(operation, axis.name, current_pass()), scaled_bytes, axis.size)
