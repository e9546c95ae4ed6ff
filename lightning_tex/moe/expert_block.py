"""What the experts held here compute, without autograd: forward and backward, behind one seam."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import starmap
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_tex.layers.mlp import Activation
from lightning_tex.moe.activation import hidden, hidden_backward
from lightning_tex.moe.products import Products

# N rows at the experts, e experts held here, D model width, H hidden width, t own tokens, k choices per token


class Matrices(NamedTuple):
    """Of all experts: up and gate [e, H, D] (not always a gate), down [e, D, H]; biases of the first [e, H].

    Those of down are added elsewhere (``output_biases``).
    """

    up: Tensor
    gate: Tensor | None
    down: Tensor
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Matrices:
        """The same in a dtype; copies only where they have another."""
        return Matrices(*(None if m is None else m.to(dtype) for m in self))  # type: ignore[arg-type]

    def of_each(self, experts: int) -> Iterator[Matrices]:
        """Those of one expert after the other."""
        return starmap(Matrices, zip(*([None] * experts if m is None else m.unbind() for m in self), strict=True))


class Kept(NamedTuple):
    """What a backward needs: tokens or rows x, the weight of each row, what up and gate gave [N, H]."""

    x: Tensor
    weights: Tensor
    up: Tensor
    gate: Tensor | None


class Wanted(NamedTuple):
    """What wants a gradient."""

    x: bool
    weights: bool
    up: bool
    gate: bool
    down: bool
    up_bias: bool
    gate_bias: bool


class InnerGradients(NamedTuple):
    """Gradients of what up and gate gave [N, H], and of the rows' weights [N]."""

    up: Tensor
    gate: Tensor | None
    weights: Tensor


class MatrixGradients:
    """Gradients of the matrices and biases that want one, summed over what is added.

    Args:
        wanted: which do.
    """

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self.up: Tensor | None = None
        self.gate: Tensor | None = None
        self.down: Tensor | None = None
        self.up_bias: Tensor | None = None
        self.gate_bias: Tensor | None = None

    def add_down(self, products: Products, grad: Tensor, values: Tensor) -> None:
        """From gradients of the experts' outputs [N, D] and what down multiplied [N, H]."""
        if self._wanted.down:
            self.down = products.matrices_backward(grad, values, self.down)

    def add_ups(self, products: Products, inner: InnerGradients, rows: Tensor) -> None:
        """From gradients of the first products and their rows [N, D]."""
        if self._wanted.up:
            self.up = products.matrices_backward(inner.up, rows, self.up)
        if self._wanted.gate and inner.gate is not None:
            self.gate = products.matrices_backward(inner.gate, rows, self.gate)
        if self._wanted.up_bias:
            self.up_bias = _sum(products.biases_backward(inner.up), self.up_bias)
        if self._wanted.gate_bias and inner.gate is not None:
            self.gate_bias = _sum(products.biases_backward(inner.gate), self.gate_bias)

    def all(self) -> Matrices:
        """Those there are, in the places of what they are gradients of."""
        return Matrices(self.up, self.gate, self.down, self.up_bias, self.gate_bias)  # type: ignore[arg-type]


def _sum(gradient: Tensor, before: Tensor | None) -> Tensor:
    return gradient if before is None else before.add_(gradient)


class ExpertBlock(ABC):
    """``down[e] @ (weight * activation(up[e] @ row + bias, gate[e] @ row + bias))`` for each token's choices, summed.

    From tokens [t, D] and the weights of their choices [t, k] to tokens [t, D]: it brings rows to the experts, and
    takes back what they give. Forward and backward are three steps each, in the order of the methods, so that something
    else may run between them while rows are under way.
    """

    @abstractmethod
    def depart(self, x: Tensor, weights: Tensor) -> None:
        """Rows may begin to travel."""

    @abstractmethod
    def inward(self, matrices: Matrices) -> list[Kept]:
        """The first products, and all that the backward needs."""

    @abstractmethod
    def outward(self, kept: list[Kept], matrices: Matrices) -> Tensor:
        """The rest: [t, D]."""

    @abstractmethod
    def depart_backward(self, grad: Tensor) -> None:
        """Gradients [t, D] may begin to travel."""

    @abstractmethod
    def backward(self, kept: list[Kept], matrices: Matrices, wanted: Wanted) -> MatrixGradients:
        """The backward of all products."""

    @abstractmethod
    def arrive_backward(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of tokens and weights, if they are wanted."""


class RowsAtOnce:
    """The products of all rows [N, D], grouped by expert.

    Args:
        products: how they are computed.
        activation: between them.
    """

    def __init__(self, products: Products, activation: Activation) -> None:
        self.products, self.activation = products, activation

    def inward(self, rows: Tensor, matrices: Matrices) -> tuple[Tensor, Tensor | None]:
        """With up and gate: [N, H] twice."""
        gate = None if matrices.gate is None else self._affine(rows, matrices.gate, matrices.gate_bias)
        return self._affine(rows, matrices.up, matrices.up_bias), gate

    def outward(self, kept: Kept, matrices: Matrices) -> Tensor:
        """The last product: [N, D]."""
        return self.products.forward(hidden(kept.up, kept.gate, kept.weights, self.activation), matrices.down)

    def inner_backward(
        self, grad: Tensor, kept: Kept, matrices: Matrices, gradients: MatrixGradients
    ) -> InnerGradients:  # [N, D]
        """The backward as far as the first products; adds the gradient of down."""
        d_hidden = self.products.rows_backward([(grad, matrices.down)])
        again, d_up, d_gate, d_weights = hidden_backward(d_hidden, kept.up, kept.gate, kept.weights, self.activation)
        gradients.add_down(self.products, grad, again)
        return InnerGradients(d_up, d_gate, d_weights)

    def rows_backward(self, inner: InnerGradients, matrices: Matrices) -> Tensor:
        """Gradients of the rows: [N, D]."""
        pairs: Sequence[tuple[Tensor, Tensor]] = [(inner.up, matrices.up)]
        if inner.gate is not None and matrices.gate is not None:
            pairs = [*pairs, (inner.gate, matrices.gate)]
        return self.products.rows_backward(pairs)

    def _affine(self, rows: Tensor, matrices: Tensor, biases: Tensor | None) -> Tensor:
        product = self.products.forward(rows, matrices)
        return product if biases is None else self.products.add_biases(product, biases)
