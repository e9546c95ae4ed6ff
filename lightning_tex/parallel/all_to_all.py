"""The all-to-all: rows to their rank, waited for at once or begun now and waited for later. No autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lightning_tex.parallel import transport
from lightning_tex.parallel.flight_record import TRAINING
from lightning_tex.parallel.replay import count_sent, replayable
from lightning_tex.parallel.started import Ready, UnderWay
from lightning_tex.parallel.topology import Axis
from lightning_tex.parallel.transport import Started


def all_to_all(
    x: Tensor,
    axis: Axis,
    received: Sequence[int] | None = None,
    sent: Sequence[int] | None = None,
    operation: str = "all_to_all",
) -> Tensor:
    """Rows to their rank: the first dim is split into ``size`` parts, part i goes to rank i. [n, ..] -> [m, ..].

    Args:
        received: rows from each rank; ``None`` with ``sent=None`` for equal parts.
        sent: rows to each rank.
    """
    if axis.size == 1:
        return x

    def run() -> Tensor:
        return _exchanged(x, axis, received, sent, operation, async_op=False).wait()

    return replayable(f"{operation} over {axis.name}", x, run)


def start_all_to_all(
    x: Tensor,
    axis: Axis,
    received: Sequence[int] | None = None,
    sent: Sequence[int] | None = None,
    operation: str = "all_to_all",
) -> UnderWay[Tensor]:
    """:func:`all_to_all` that begins now and is on no tape."""
    return Ready(x) if axis.size == 1 else _exchanged(x, axis, received, sent, operation, async_op=True)


class _Exchanged(NamedTuple):
    """An all-to-all that has begun."""

    out: Tensor
    work: Started | None
    entry: tuple[Any, ...]

    def wait(self) -> Tensor:
        TRAINING.wait(self.entry)
        if self.work is not None:
            self.work.wait()
        TRAINING.leave()
        return self.out


def _exchanged(
    x: Tensor, axis: Axis, received: Sequence[int] | None, sent: Sequence[int] | None, operation: str, async_op: bool
) -> _Exchanged:
    rows = x.shape[0] if received is None else sum(received)
    out = x.new_empty((rows, *x.shape[1:]))
    entry = TRAINING.begin("all_to_all", axis, x)
    if not async_op:
        TRAINING.wait(entry)
    work = transport.all_to_all_single(out, x, received, sent, axis.group, async_op)
    own = x.shape[0] // axis.size if sent is None else sent[axis.rank]
    row_bytes = x[:1].numel() * x.element_size() if x.shape[0] else 0
    count_sent(operation, axis, axis.size * (x.shape[0] - own) * row_bytes)
    return _Exchanged(out, work, entry)
