"""Products of rows with their experts' matrices: how they are computed is behind one seam."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_tex.moe.groups import Groups
from lightning_tex.parallel.compiled import leaf
from lightning_tex.parallel.device import device_type

# N rows in e groups, in and out: widths of a product

# Operands of the grouped product begin, and have rows, at multiples of this.
_ALIGNMENT = 16
# It takes fewer groups than this.
_MOST_GROUPS = 1024


class Products(ABC):
    """Products of rows with their experts' matrices. Without autograd, and none of autocast.

    Args:
        groups: which rows belong to which expert.
    """

    def __init__(self, groups: Groups) -> None:
        self.groups = groups

    @staticmethod
    def of(groups: Groups, dtype: torch.dtype, matrices: Sequence[Tensor]) -> Products:
        """Those that are fastest for rows of a dtype and [e, out, in] matrices, and wait least."""
        kind = GroupedProducts if GroupedProducts.take(dtype, matrices) else LoopedProducts
        return kind(groups)

    @abstractmethod
    def forward(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """``rows @ matrices[e].mT``: [N, in], [e, out, in] -> [N, out]."""

    @abstractmethod
    def rows_backward(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The sum of ``grad @ matrices[e]`` over pairs of [N, out] and [e, out, in]: [N, in]."""

    @abstractmethod
    def matrices_backward(self, grad: Tensor, rows: Tensor, added_to: Tensor | None = None) -> Tensor:
        """``grad.mT @ rows`` of each group, zeros of an empty one: [N, out], [N, in] -> [e, out, in].

        Args:
            added_to: what it is added to, in its place.
        """

    @abstractmethod
    def add_biases(self, products: Tensor, biases: Tensor) -> Tensor:
        """Each row's expert's bias, in the place of the products: [N, out], [e, out] -> [N, out]."""

    @abstractmethod
    def biases_backward(self, grad: Tensor) -> Tensor:
        """The sum of each group's rows, zeros of an empty one: [N, out] -> [e, out]."""


class GroupedProducts(Products):
    """One kernel for all experts, which reads where groups end on the device (``torch.nn.functional.grouped_mm``)."""

    @staticmethod
    def take(dtype: torch.dtype, matrices: Sequence[Tensor]) -> bool:
        """Whether a product has such a kernel: of bf16 on GPUs, at aligned addresses."""
        # Of other dtypes it is a loop as well, which asks the device for the groups' ends.
        if dtype != torch.bfloat16 or device_type(matrices[0]) == "cpu" or len(matrices[0]) >= _MOST_GROUPS:
            return False
        widths = {width for matrix in matrices for width in matrix.shape[1:]}
        return all(width and width * dtype.itemsize % _ALIGNMENT == 0 for width in widths)

    def forward(self, rows: Tensor, matrices: Tensor) -> Tensor:
        if not len(rows):
            return rows.new_zeros(0, matrices.shape[1])
        return F.grouped_mm(rows, matrices.mT, offs=self.groups.ends)

    def rows_backward(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        if not self.groups.rows:
            return pairs[0][0].new_zeros(0, pairs[0][1].shape[2])
        first, *others = (F.grouped_mm(grad, matrices, offs=self.groups.ends) for grad, matrices in pairs)
        for other in others:
            first += other
        return first

    def matrices_backward(self, grad: Tensor, rows: Tensor, added_to: Tensor | None = None) -> Tensor:
        if not len(rows):
            none = rows.new_zeros(len(self.groups.ends), grad.shape[1], rows.shape[1])
            return added_to if added_to is not None else none
        of_all = F.grouped_mm(grad.mT, rows, offs=self.groups.ends)
        return of_all if added_to is None else added_to.add_(of_all)

    def add_biases(self, products: Tensor, biases: Tensor) -> Tensor:
        rows = torch.arange(len(products), device=products.device)
        return _add_picked(products, torch.searchsorted(self.groups.ends, rows, right=True), biases)

    def biases_backward(self, grad: Tensor) -> Tensor:
        # As products with ones: a sum by index would add in any order.
        return self.matrices_backward(grad, grad.new_ones(len(grad), _ALIGNMENT))[..., 0]


@leaf
def _add_picked(rows: Tensor, index: Tensor, added: Tensor) -> Tensor:
    return rows.add_(added[index])


class LoopedProducts(Products):
    """One product after the other, each into its place."""

    def parts(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """Each expert's rows of some tensors."""
        ends = list(accumulate(self.groups.sizes))
        starts = [0, *ends[:-1]]
        return [tuple(t[start:end] for t in tensors) for start, end in zip(starts, ends, strict=True)]

    def forward(self, rows: Tensor, matrices: Tensor) -> Tensor:
        out = rows.new_empty(len(rows), matrices.shape[1])
        for (part, place), matrix in zip(self.parts(rows, out), matrices, strict=True):
            torch.mm(part, matrix.mT, out=place)
        return out

    def rows_backward(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        grad, matrices = pairs[0]
        out = grad.new_empty(len(grad), matrices.shape[2])
        for number, (grad, matrices) in enumerate(pairs):
            for (part, place), matrix in zip(self.parts(grad, out), matrices, strict=True):
                if number:
                    place.addmm_(part, matrix)
                else:
                    torch.mm(part, matrix, out=place)
        return out

    def matrices_backward(self, grad: Tensor, rows: Tensor, added_to: Tensor | None = None) -> Tensor:
        out = rows.new_empty(len(self.groups.sizes), grad.shape[1], rows.shape[1]) if added_to is None else added_to
        for (grad_part, part), place in zip(self.parts(grad, rows), out, strict=True):
            if added_to is None:
                torch.mm(grad_part.mT, part, out=place)
            else:
                place.addmm_(grad_part.mT, part)
        return out

    def add_biases(self, products: Tensor, biases: Tensor) -> Tensor:
        for (part,), bias in zip(self.parts(products), biases, strict=True):
            part.add_(bias)
        return products

    def biases_backward(self, grad: Tensor) -> Tensor:
        return torch.stack([part.sum(0) for (part,) in self.parts(grad)])
