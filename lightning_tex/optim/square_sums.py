"""The sum of squares of all gradients, in a number of launches that does not grow with them, and no look at a value.

It is infinite or NaN where an element is, so that it answers both questions of a step: how large, and whether finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from lightning_tex.optim.gradients import Gradients
from lightning_tex.parallel.device import device_type

# Elements of which the CPU takes a norm at once: it adds them up one after the other, so that more would cost accuracy,
# and 16-bit ones are upcast into memory of their own.
_AT_ONCE = 1 << 18
# GPUs add up as a tree. A list of tensors is walked in launches of some 2^24 elements; one that is larger than several
# of them is a launch of its own.
_LARGE = 1 << 26


def square_sums(buffers: Sequence[Gradients], device: torch.device) -> Tensor:
    """Sums of squares of the combined own parts: of the buffers that a norm counts, and of all. [2] fp64

    Squares are added up in the gradients' precision, fp32 at least, and these sums in fp64.

    Args:
        buffers: gradients, combined.
        device: theirs.
    """
    pieces: list[Tensor] = []
    divisors: list[float] = []
    counted = 0  # pieces of buffers that are: they come first
    for gradients in sorted(buffers, key=lambda gradients: not gradients.buffer.counted):
        own = gradients.own
        new = own.split(_AT_ONCE) if device_type(own) == "cpu" else (own,)
        pieces += new
        divisors += len(new) * [gradients.divisor]
        counted += len(new) * gradients.buffer.counted
    if not pieces:
        return torch.zeros(2, dtype=torch.float64, device=device)
    norms = torch.stack(_norms(pieces)).double()
    torch._foreach_div_(list(norms.unbind()), divisors)
    squares = norms.square_()
    return torch.stack([squares[:counted].sum(), squares.sum()])


def _upcast_norms(pieces: list[Tensor], kind: torch.dtype) -> list[Tensor]:
    """The same, each piece upcast to the same memory: to allocate it anew costs the CPU more than the norm."""
    memory = torch.empty(max(map(len, pieces)), dtype=kind, device=pieces[0].device)
    return [torch.linalg.vector_norm(memory[: len(piece)].copy_(piece)) for piece in pieces]


def _norms(pieces: list[Tensor]) -> list[Tensor]:
    """The 2-norm of each: scalars of one dtype."""
    kind = reduce(torch.promote_types, {piece.dtype for piece in pieces}, torch.float32)
    norms: dict[int, Tensor] = {}
    lists: dict[torch.dtype, list[int]] = {}
    for i, piece in enumerate(pieces):
        if len(piece) > _LARGE:
            norms[i] = torch.linalg.vector_norm(piece, dtype=kind)
        else:
            lists.setdefault(piece.dtype, []).append(i)
    for dtype, places in lists.items():
        listed = [pieces[i] for i in places]
        upcast = dtype.itemsize < 4 and device_type(listed[0]) == "cpu"
        found = _upcast_norms(listed, kind) if upcast else torch._foreach_norm(listed, dtype=kind)
        norms.update(zip(places, found, strict=True))
    return [norms[i] for i in range(len(pieces))]
