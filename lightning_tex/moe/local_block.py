"""The experts' computation where nothing travels: rows are picked from the own tokens, and not kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import starmap
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_tex.layers.mlp import Activation
from lightning_tex.moe.activation import hidden, hidden_backward
from lightning_tex.moe.exchange import Exchange
from lightning_tex.moe.expert_block import ExpertBlock, Kept, Matrices, MatrixGradients, RowsAtOnce, Wanted

# N rows at the experts, D model width, H hidden width, t own tokens, k choices per token


class LocalBlock(ExpertBlock):
    """From tokens to tokens without an exchange.

    Args:
        local: which rows are whose.
    """

    def __init__(self, local: Exchange) -> None:
        self.local = local
        self._given: tuple[Tensor, ...] = ()

    def depart(self, x: Tensor, weights: Tensor) -> None:
        self._given = x, self.local.start_choices_to_experts(weights).wait()

    def inward(self, matrices: Matrices) -> list[Kept]:
        (x, weights), self._given = self._given, ()
        return [Kept(x, weights, *self.first_products(x, matrices))]

    def outward(self, kept: list[Kept], matrices: Matrices) -> Tensor:
        return self.last_product(kept[0], matrices)

    def depart_backward(self, grad: Tensor) -> None:
        self._given = (grad,)

    def backward(self, kept: list[Kept], matrices: Matrices, wanted: Wanted) -> MatrixGradients:
        (grad,), self._given = self._given, ()
        gradients = MatrixGradients(wanted)
        self._given = self.backwards(grad, kept[0], matrices, gradients, wanted)
        return gradients

    def arrive_backward(self) -> tuple[Tensor | None, Tensor | None]:
        (d_x, d_weights), self._given = self._given, ()
        return d_x, self.local.start_choices_from_experts(d_weights).wait()

    @abstractmethod
    def first_products(self, x: Tensor, matrices: Matrices) -> tuple[Tensor, Tensor | None]:
        """With up and gate: [N, H] twice."""

    @abstractmethod
    def last_product(self, kept: Kept, matrices: Matrices) -> Tensor:
        """With down, summed over each token's choices: [t, D]."""

    @abstractmethod
    def backwards(
        self, grad: Tensor, kept: Kept, matrices: Matrices, gradients: MatrixGradients, wanted: Wanted
    ) -> tuple[Tensor, Tensor]:
        """Gradients of tokens [t, D] and of the rows' weights [N]; adds those of the matrices."""


class LocalAtOnce(LocalBlock):
    """All rows at once.

    Args:
        local: which rows are whose.
        of_rows: their products.
    """

    def __init__(self, local: Exchange, of_rows: RowsAtOnce) -> None:
        super().__init__(local)
        self._of_rows = of_rows

    def first_products(self, x: Tensor, matrices: Matrices) -> tuple[Tensor, Tensor | None]:
        return self._of_rows.inward(self._rows(x), matrices)

    def last_product(self, kept: Kept, matrices: Matrices) -> Tensor:
        return self.local.start_from_experts(self._of_rows.outward(kept, matrices)).wait()

    def backwards(
        self, grad: Tensor, kept: Kept, matrices: Matrices, gradients: MatrixGradients, wanted: Wanted
    ) -> tuple[Tensor, Tensor]:
        inner = self._of_rows.inner_backward(self._rows(grad), kept, matrices, gradients)
        gradients.add_ups(self._of_rows.products, inner, self._rows(kept.x))
        d_rows = self._of_rows.rows_backward(inner, matrices)
        return self.local.start_from_experts(d_rows).wait(), inner.weights

    def _rows(self, x: Tensor) -> Tensor:
        return self.local.start_to_experts(x).wait()


class _Expert(NamedTuple):
    """What is one expert's: its rows' tokens, and views of its part of what is kept, and of its matrices."""

    token: Tensor
    weights: Tensor
    up: Tensor
    gate: Tensor | None
    matrices: Matrices


class LocalByExpert(LocalBlock):
    """One expert after the other, where nothing travels and nobody waits: no more than an expert's rows exist at once.

    On a CPU, whose caches hold an expert's rows and not all of them.

    Args:
        local: which rows are whose.
        activation: between the products.
    """

    def __init__(self, local: Exchange, activation: Activation) -> None:
        assert not local.gaps
        super().__init__(local)
        self.activation = activation
        self.sizes = local.groups.sizes
        self.token = local.choice // local.slot.shape[1]

    def first_products(self, x: Tensor, matrices: Matrices) -> tuple[Tensor, Tensor | None]:
        up = x.new_empty(self.local.groups.rows, matrices.up.shape[1])
        gate = None if matrices.gate is None else torch.empty_like(up)
        for expert in self._experts(Kept(x, self.token, up, gate), matrices):
            rows = x.index_select(0, expert.token)
            torch.mm(rows, expert.matrices.up.t(), out=expert.up)
            if expert.gate is not None and expert.matrices.gate is not None:
                torch.mm(rows, expert.matrices.gate.t(), out=expert.gate)
            for product, bias in zip((expert.up, expert.gate), expert.matrices[3:], strict=True):
                if product is not None and bias is not None:
                    product.add_(bias)
        return up, gate

    def last_product(self, kept: Kept, matrices: Matrices) -> Tensor:
        sums = self._sums(kept.x)
        for expert in self._experts(kept, matrices):
            value = hidden(expert.up, expert.gate, expert.weights, self.activation)
            sums.add(expert.token, [(value, expert.matrices.down.t())])
        return sums.total()

    def backwards(
        self, grad: Tensor, kept: Kept, matrices: Matrices, gradients: MatrixGradients, wanted: Wanted
    ) -> tuple[Tensor, Tensor]:
        sums, d_weights = self._sums(kept.x), []
        wanted_matrices = zip(matrices, wanted[2:], strict=True)
        d_matrices = Matrices(*(torch.empty_like(m) if w else None for m, w in wanted_matrices))  # type: ignore[arg-type]
        for expert, places in zip(self._experts(kept, matrices), d_matrices.of_each(len(self.sizes)), strict=True):
            d_rows, rows = grad.index_select(0, expert.token), kept.x.index_select(0, expert.token)
            d_hidden = d_rows @ expert.matrices.down
            again, d_up, d_gate, d_weight = hidden_backward(
                d_hidden, expert.up, expert.gate, expert.weights, self.activation
            )
            d_weights.append(d_weight)
            for place, out, into in zip(places[:3], (d_up, d_gate, d_rows), (rows, rows, again), strict=True):
                if place is not None and out is not None:
                    torch.mm(out.t(), into, out=place)
            for place, out in zip(places[3:], (d_up, d_gate), strict=True):
                if place is not None and out is not None:
                    torch.sum(out, 0, out=place)
            pairs = [(d_up, expert.matrices.up)]
            if d_gate is not None and expert.matrices.gate is not None:
                pairs.append((d_gate, expert.matrices.gate))
            sums.add(expert.token, pairs)
        gradients.up, gradients.gate, gradients.down, gradients.up_bias, gradients.gate_bias = d_matrices
        return sums.total(), torch.cat(d_weights)

    def _experts(self, kept: Kept, matrices: Matrices) -> Iterator[_Expert]:
        # Views of all at once: of each by itself they take as long as small products.
        gate = [None] * len(self.sizes) if kept.gate is None else kept.gate.split(self.sizes)
        parts = (t.split(self.sizes) for t in (self.token, kept.weights.to(kept.up.dtype), kept.up))
        return starmap(_Expert, zip(*parts, gate, matrices.of_each(len(self.sizes)), strict=True))

    def _sums(self, x: Tensor) -> _Sums:
        if x.dtype == torch.promote_types(x.dtype, torch.float32):
            return _SumsAtOnce(x)
        return _SumsOfRows(x, self.local)


class _Sums(ABC):
    """Sums over each token's choices: [t, D]."""

    @abstractmethod
    def add(self, token: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add the next rows: the sum of the products of some pairs of matrices, to these tokens."""

    @abstractmethod
    def total(self) -> Tensor:
        """When all rows are there."""


class _SumsAtOnce(_Sums):
    """Rows are added when they are there, in the precision that they have."""

    def __init__(self, x: Tensor) -> None:
        self._total = torch.zeros_like(x, memory_format=torch.contiguous_format)

    def add(self, token: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        (a, b), *others = pairs
        rows = a @ b
        for a, b in others:
            rows.addmm_(a, b)
        self._total.index_add_(0, token, rows)

    def total(self) -> Tensor:
        return self._total


class _SumsOfRows(_Sums):
    """All rows are there before they are added, which is done in more precision than they have."""

    def __init__(self, x: Tensor, local: Exchange) -> None:
        self._local, self._rows = local, x.new_empty(local.groups.rows, x.shape[1])
        self._places = iter(self._rows.split(local.groups.sizes))

    def add(self, token: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        (a, b), *others = pairs
        rows = torch.mm(a, b, out=next(self._places))
        for a, b in others:
            rows.addmm_(a, b)

    def total(self) -> Tensor:
        return self._local.start_from_experts(self._rows).wait()
