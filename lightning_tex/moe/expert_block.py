"""What the experts held here compute, without autograd: forward and backward, for all rows or part by part."""

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
from lightning_tex.moe.products import Products

# N rows at the experts, e experts held here, D model width, H hidden width, t own tokens


class Matrices(NamedTuple):
    """Of all experts: up and gate [e, H, D] (not always a gate), down [e, D, H]; biases of the first [e, H].

    Those of down are added elsewhere (``output_biases``).
    """

    up: Tensor
    gate: Tensor | None
    down: Tensor
    up_bias: Tensor | None
    gate_bias: Tensor | None

    def to(self, dtype: torch.dtype) -> Matrices:
        """The same in a dtype; copies only where they have another."""
        return Matrices(*(None if m is None else m.to(dtype) for m in self))  # type: ignore[arg-type]

    def of_each(self, experts: int) -> Iterator[Matrices]:
        """Those of one expert after the other."""
        return starmap(Matrices, zip(*([None] * experts if m is None else m.unbind() for m in self), strict=True))


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
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None


class ExpertBlock(ABC):
    """``down[e] @ (weight * activation(up[e] @ row + bias, gate[e] @ row + bias))`` for the rows of all experts e.

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
        activation: between them.
        local: picks the rows from tokens and sums into them; ``None`` where rows have travelled.
    """

    def __init__(self, products: Products, activation: Activation, local: Exchange | None = None) -> None:
        self.products, self.activation, self.local = products, activation, local

    def inward(self, x: Tensor, matrices: Matrices) -> tuple[Tensor, Tensor | None]:
        rows = self._rows(x)
        gate = None if matrices.gate is None else self._affine(rows, matrices.gate, matrices.gate_bias)
        return self._affine(rows, matrices.up, matrices.up_bias), gate

    def outward(self, kept: Kept, matrices: Matrices) -> Tensor:
        value = hidden(kept.up, kept.gate, kept.weights, self.activation)
        return self._summed(self.products.forward(value, matrices.down))

    def backward(self, grad: Tensor, kept: Kept, matrices: Matrices, wanted: Matrices) -> Gradients:
        products, grad = self.products, self._rows(grad).contiguous()
        d_hidden = products.rows_backward([(grad, matrices.down)])
        again, d_up, d_gate, d_weights = hidden_backward(d_hidden, kept.up, kept.gate, kept.weights, self.activation)
        d_down_matrices = products.matrices_backward(grad, again) if wanted.down else None
        del grad, d_hidden, again
        rows = self._rows(kept.x)
        d_up_matrices = products.matrices_backward(d_up, rows) if wanted.up else None
        d_gate_matrices = products.matrices_backward(d_gate, rows) if wanted.gate and d_gate is not None else None
        del rows
        d_up_bias = products.biases_backward(d_up) if wanted.up_bias else None
        d_gate_bias = products.biases_backward(d_gate) if wanted.gate_bias and d_gate is not None else None
        pairs = [(d_up, matrices.up)]
        if d_gate is not None and matrices.gate is not None:
            pairs.append((d_gate, matrices.gate))
        d_x = self._summed(products.rows_backward(pairs))
        return Gradients(d_x, d_weights, d_up_matrices, d_gate_matrices, d_down_matrices, d_up_bias, d_gate_bias)

    def _affine(self, rows: Tensor, matrices: Tensor, biases: Tensor | None) -> Tensor:
        product = self.products.forward(rows, matrices)
        return product if biases is None else self.products.add_biases(product, biases)

    def _rows(self, x: Tensor) -> Tensor:
        return x if self.local is None else self.local.to_experts(x)

    def _summed(self, rows: Tensor) -> Tensor:
        return rows if self.local is None else self.local.from_experts(rows)


class _Expert(NamedTuple):
    """What is one expert's: its rows' tokens, and views of its part of what is kept, and of its matrices."""

    token: Tensor
    weights: Tensor
    up: Tensor
    gate: Tensor | None
    matrices: Matrices


class BlockByExpert(ExpertBlock):
    """One expert after the other, where nothing travels and nobody waits: no more than an expert's rows exist at once.

    On a CPU, whose caches hold an expert's rows and not all of them.

    Args:
        local: which rows are whose.
        activation: between the products.
    """

    def __init__(self, local: Exchange, activation: Activation) -> None:
        assert not local.gaps
        self.activation = activation
        self.local, self.sizes = local, local.groups.sizes
        self.token = local.choice // local.slot.shape[1]

    def inward(self, x: Tensor, matrices: Matrices) -> tuple[Tensor, Tensor | None]:
        up = x.new_empty(self.local.groups.rows, matrices.up.shape[1])
        gate = None if matrices.gate is None else torch.empty_like(up)
        for expert in self._experts(Kept(x, self.token, up, gate), matrices):
            rows = x.index_select(0, expert.token)
            torch.mm(rows, expert.matrices.up.t(), out=expert.up)
            if expert.gate is not None and expert.matrices.gate is not None:
                torch.mm(rows, expert.matrices.gate.t(), out=expert.gate)
            for product, bias in zip(
                (expert.up, expert.gate), (expert.matrices.up_bias, expert.matrices.gate_bias), strict=True
            ):
                if product is not None and bias is not None:
                    product.add_(bias)
        return up, gate

    def outward(self, kept: Kept, matrices: Matrices) -> Tensor:
        sums = self._sums(kept.x)
        for expert in self._experts(kept, matrices):
            value = hidden(expert.up, expert.gate, expert.weights, self.activation)
            sums.add(expert.token, [(value, expert.matrices.down.t())])
        return sums.total()

    def backward(self, grad: Tensor, kept: Kept, matrices: Matrices, wanted: Matrices) -> Gradients:
        sums, d_weights = self._sums(kept.x), []
        d_matrices = Matrices(*(torch.empty_like(m) if w else None for m, w in zip(matrices, wanted, strict=True)))  # type: ignore[arg-type]
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
        return Gradients(sums.total(), torch.cat(d_weights), *d_matrices)

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
        return self._local.from_experts(self._rows)
