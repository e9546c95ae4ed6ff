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

# On CPU a norm is taken of rows of so many elements: threads share the rows, and each is added up one element after the
# other, so that more would cost accuracy.
_ROW = 1 << 12
# Rows at once: of those that are upcast, in memory of their own, and of others.
_UPCAST_ROWS, _ROWS = 1 << 8, 1 << 12
# GPUs add up as a tree. A list of tensors is walked in launches of some 2^24 elements; one that is larger than several
# of them is a launch of its own.
_LARGE = 1 << 26


def square_sums(buffers: Sequence[Gradients], device: torch.device, exact: bool = True) -> Tensor:
    """Sums of squares of the combined own parts: of the buffers that a norm counts, and of all. [2] fp64

    Squares are added up in the gradients' precision, fp32 at least, and these sums in fp64.

    Args:
        buffers: gradients, combined.
        device: theirs.
        exact: else it matters only whether they are finite: the CPU takes half the time for bf16.
    """
    if not buffers:
        return torch.zeros(2, dtype=torch.float64, device=device)
    counted_first = sorted(buffers, key=lambda gradients: not gradients.buffer.counted)
    parts = [gradients.own for gradients in counted_first]
    if device_type(parts[0]) == "cpu":
        squares = torch.stack([_square_by_rows(part, exact) for part in parts])
    else:
        squares = torch.stack(_norms(parts)).double().square_()
    torch._foreach_div_(list(squares.unbind()), [gradients.divisor**2 for gradients in counted_first])
    counted = sum(gradients.buffer.counted for gradients in buffers)
    return torch.stack([squares[:counted].sum(), squares.sum()])


def _norms(parts: list[Tensor]) -> list[Tensor]:
    """The 2-norm of each: scalars of one dtype."""
    kind = reduce(torch.promote_types, {part.dtype for part in parts}, torch.float32)
    norms: dict[int, Tensor] = {}
    lists: dict[torch.dtype, list[int]] = {}
    for i, part in enumerate(parts):
        if len(part) > _LARGE:
            norms[i] = torch.linalg.vector_norm(part, dtype=kind)
        else:
            lists.setdefault(part.dtype, []).append(i)
    for places in lists.values():
        norms.update(zip(places, torch._foreach_norm([parts[i] for i in places], dtype=kind), strict=True))
    return [norms[i] for i in range(len(parts))]


def _square_by_rows(part: Tensor, exact: bool) -> Tensor:
    """Sum of squares: an fp64 scalar."""
    whole = len(part) // _ROW * _ROW
    rows, rest = part[:whole].view(-1, _ROW), part[whole:].view(1, -1)
    # Rounded to bf16 a norm is still finite or not; fp16 ends too early for that.
    upcast = part.dtype.itemsize < 4 and (exact or part.dtype != torch.bfloat16)
    if upcast:
        # To allocate it anew every time costs more than the norm.
        memory = torch.empty(min(len(rows), _UPCAST_ROWS) or 1, _ROW, dtype=torch.float32, device=part.device)
        norms = [_norm(memory[: len(some)].copy_(some)) for some in rows.split(_UPCAST_ROWS)]
        norms.append(_norm(memory[:1, : rest.shape[1]].copy_(rest)))
    else:
        norms = [_norm(some) for some in (*rows.split(_ROWS), rest)]
    return torch.stack([norm.double().square_().sum() for norm in norms]).sum()


def _norm(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1)
