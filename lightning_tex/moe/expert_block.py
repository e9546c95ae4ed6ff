"""What the experts held here compute, without autograd: forward and backward, for all rows or part by part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_tex.moe.activation import hidden, hidden_backward
from lightning_tex.moe.exchange import Exchange
from lightning_tex.moe.products import Products

# N rows at the experts, e experts held here, D model width, H hidden width, t own tokens


class Matrices(NamedTuple):
    """Of all experts: up and gate [e, H, D] (no gate with gelu), down [e, D, H]."""

    up: Tensor
    gate: Tensor | None
    down: Tensor

    def to(self, dtype: torch.dtype) -> Matrices:
        """The same in a dtype; copies only where they have another."""
        return Matrices(*(None if m is None else m.to(dtype) for m in self))  # type: ignore[arg-type]


class Kept(NamedTuple):
    """What a backward needs: tokens or rows x, the weight of each row [N], what up and gate gave [N, H]."""

    x: Tensor
    weights: Tensor
    up: Tensor
    gate: Tensor | None


class Gradients(NamedTuple):
    """Of one backward; those that nobody wants are None."""

    x: Tensor
    weights: Tensor
    up: Tensor | None
    gate: Tensor | None
    down: Tensor | None


class ExpertBlock(ABC):
    """``down[e] @ (weight * activation(up[e] @ row, gate[e] @ row))`` for the rows of all experts e.

    It takes rows [N, D] that have travelled and gives as many; or, where nothing travels, tokens [t, D], of which it
    picks the rows and into which it sums what comes out.
    """

    @abstractmethod
    def inward(self, x: Tensor, matrices: Matrices) -> tuple[Tensor, Tensor | None]:
        """The products with up and gate: [N, H] twice."""

    @abstractmethod
    def outward(self, kept: Kept, matrices: Matrices) -> Tensor:
        """The rest, shaped as x."""

    @abstractmethod
    def backward(self, grad: Tensor, kept: Kept, matrices: Matrices, wanted: Matrices) -> Gradients:
        """The backward of both.

        Args:
            grad: shaped as x.
            wanted: truth values in place of matrices: which of them want a gradient.
        """


class BlockOfRows(ExpertBlock):
    """All rows at once.

    Args:
        products: how their products are computed.
        local: picks the rows from tokens and sums into them; ``None`` where rows have travelled.
    """

    def __init__(self, products: Products, local: Exchange | None = None) -> None:
        self.products, self.local = products, local

    def inward(self, x: Tensor, matrices: Matrices) -> tuple[Tensor, Tensor | None]:
        rows = self._rows(x)
        gate = None if matrices.gate is None else self.products.forward(rows, matrices.gate)
        return self.products.forward(rows, matrices.up), gate

    def outward(self, kept: Kept, matrices: Matrices) -> Tensor:
        return self._summed(self.products.forward(hidden(kept.up, kept.gate, kept.weights), matrices.down))

    def backward(self, grad: Tensor, kept: Kept, matrices: Matrices, wanted: Matrices) -> Gradients:
        products, grad = self.products, self._rows(grad).contiguous()
        d_hidden = products.rows_backward([(grad, matrices.down)])
        again, d_up, d_gate, d_weights = hidden_backward(d_hidden, kept.up, kept.gate, kept.weights)
        d_down_matrices = products.matrices_backward(grad, again) if wanted.down else None
        del grad, d_hidden, again
        rows = self._rows(kept.x)
        d_up_matrices = products.matrices_backward(d_up, rows) if wanted.up else None
        d_gate_matrices = products.matrices_backward(d_gate, rows) if wanted.gate and d_gate is not None else None
        del rows
        pairs = [(d_up, matrices.up)]
        if d_gate is not None and matrices.gate is not None:
            pairs.append((d_gate, matrices.gate))
        d_x = self._summed(products.rows_backward(pairs))
        return Gradients(d_x, d_weights, d_up_matrices, d_gate_matrices, d_down_matrices)

    def _rows(self, x: Tensor) -> Tensor:
        return x if self.local is None else self.local.to_experts(x)

    def _summed(self, rows: Tensor) -> Tensor:
        return rows if self.local is None else self.local.from_experts(rows)


class BlockByExpert(ExpertBlock):
    """One expert after the other, where nothing travels and nobody waits: no more than an expert's rows exist at once.

    On a CPU, whose caches hold an expert's rows and not all of them.

    Args:
        local: which rows are whose.
    """

    def __init__(self, local: Exchange) -> None:
        assert not local.gaps
        self.groups = local.groups
        self.token = local.choice // local.slot.shape[1]

    def inward(self, x: Tensor, matrices: Matrices) -> tuple[Tensor, Tensor | None]:
        up = x.new_empty(self.groups.rows, matrices.up.shape[1])
        gate = None if matrices.gate is None else torch.empty_like(up)
        for e, part in self._parts():
            rows = x.index_select(0, self.token[part])
            torch.mm(rows, matrices.up[e].mT, out=up[part])
            if gate is not None and matrices.gate is not None:
                torch.mm(rows, matrices.gate[e].mT, out=gate[part])
        return up, gate

    def outward(self, kept: Kept, matrices: Matrices) -> Tensor:
        total = self._zeros(kept.x)
        for e, part in self._parts():
            value = hidden(kept.up[part], None if kept.gate is None else kept.gate[part], kept.weights[part])
            self._add(total, part, value @ matrices.down[e].mT)
        return total.to(kept.x.dtype)

    def backward(self, grad: Tensor, kept: Kept, matrices: Matrices, wanted: Matrices) -> Gradients:
        d_x, d_weights = self._zeros(kept.x), torch.empty_like(kept.weights)
        d_matrices = Matrices(*(torch.empty_like(m) if w else None for m, w in zip(matrices, wanted, strict=True)))  # type: ignore[arg-type]
        for e, part in self._parts():
            token = self.token[part]
            d_rows, rows = grad.index_select(0, token), kept.x.index_select(0, token)
            gate = None if kept.gate is None else kept.gate[part]
            again, d_up, d_gate, d_weights[part] = hidden_backward(
                d_rows @ matrices.down[e], kept.up[part], gate, kept.weights[part]
            )
            for place, out, into in zip(d_matrices, (d_up, d_gate, d_rows), (rows, rows, again), strict=True):
                if place is not None and out is not None:
                    torch.mm(out.mT, into, out=place[e])
            d_rows = d_up @ matrices.up[e]
            if d_gate is not None and matrices.gate is not None:
                d_rows.addmm_(d_gate, matrices.gate[e])
            self._add(d_x, part, d_rows)
        return Gradients(d_x.to(kept.x.dtype), d_weights, *d_matrices)

    def _parts(self) -> Iterator[tuple[int, slice]]:
        ends = accumulate(self.groups.sizes)
        return ((e, slice(end - n, end)) for e, (n, end) in enumerate(zip(self.groups.sizes, ends, strict=True)))

    def _zeros(self, x: Tensor) -> Tensor:
        return torch.zeros_like(
            x, dtype=torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format
        )

    def _add(self, total: Tensor, part: slice, rows: Tensor) -> None:
        total.index_add_(0, self.token[part], rows.to(total.dtype))
