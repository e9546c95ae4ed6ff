"""Gradients of a head whose logits exist a chunk of tokens at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_tex.parallel.compiled import leaf

# T tokens, v columns of the logits here (ceil(V / tensor)), D model width

# Bytes of what is added to the matrix's gradient at once, where a product cannot add to what is there.
SLICE_BYTES = 32 * 2**20


class HeadMatrix(NamedTuple):
    """The head's: [v, D], [v]."""

    weight: Tensor
    bias: Tensor | None

    def to(self, dtype: torch.dtype) -> HeadMatrix:
        return HeadMatrix(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


class HeadGradients:
    """Gradients of x and of the head's matrix and bias, added up chunk by chunk.

    Args:
        x: [T, D]
        matrix: in the dtype of x.
        needed: whether each of the three is.
        chunks: how many there are.
    """

    def __init__(self, x: Tensor, matrix: HeadMatrix, needed: tuple[bool, bool, bool], chunks: int) -> None:
        weight = matrix.weight
        self.x = torch.empty_like(x) if needed[0] else None
        self.bias = None
        if needed[2] and matrix.bias is not None:
            self.bias = torch.zeros_like(matrix.bias, dtype=torch.promote_types(weight.dtype, torch.float32))
        wide = weight.dtype if chunks == 1 else torch.promote_types(weight.dtype, torch.float32)
        self.weight = torch.empty_like(weight, dtype=wide) if needed[1] else None

    def add(self, chunk: slice, logits: Tensor, x: Tensor, weight: Tensor) -> None:
        """A chunk's part, by the gradient of its logits."""
        if self.x is not None:
            torch.mm(logits, weight, out=self.x[chunk])
        if self.bias is not None:
            self.bias += logits.sum(0, dtype=self.bias.dtype)
        if self.weight is None:
            return
        beta = 0 if chunk.start == 0 else 1  # 0: what is there does not count, not even where it is NaN
        if logits.dtype == self.weight.dtype:
            torch.addmm(self.weight, logits.mT, x, beta=beta, out=self.weight)
        elif logits.is_cuda:
            torch.addmm(self.weight, logits.mT, x, self.weight.dtype, beta=beta, out=self.weight)
        else:
            rows = max(1, SLICE_BYTES // (x.shape[-1] * x.element_size()))
            for part, columns in zip(self.weight.split(rows), logits.mT.split(rows), strict=True):
                part.copy_(columns @ x) if beta == 0 else part.add_(columns @ x)

    def scale(self, factor: Tensor) -> None:
        """Times one number."""
        for gradient in (self.x, self.weight, self.bias):
            if gradient is not None:
                gradient.mul_(factor) if gradient.dtype == factor.dtype else _scale(gradient, factor)


@leaf
def _scale(x: Tensor, factor: Tensor) -> None:
    """In place, in the factor's precision: a GPU would take a single number in the dtype of x, a CPU does not."""
    if x.is_cuda:
        x.copy_(x.to(factor.dtype).mul_(factor))
    else:
        x.mul_(factor)
