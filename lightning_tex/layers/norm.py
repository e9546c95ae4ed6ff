"""Norms that keep their weights and arithmetic in full precision among low-precision activations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_tex.parallel.autocast import autocast_off
from lightning_tex.parallel.compiled import leaf

# T tokens, D model width


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` in its weight's precision, at least fp32: [.., D] -> [.., D], in the input's dtype.

    For the backward it keeps its input as it is, and one number a row.
    """

    def forward(self, x: Tensor) -> Tensor:
        if len(self.normalized_shape) > 1:
            return F.rms_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.eps).to(x.dtype)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        normed: Tensor = _RMSNorm.apply(x, self.weight, torch.finfo(wide).eps if self.eps is None else self.eps)
        return normed


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` in its weight's precision: [.., D] -> [.., D], in the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        with autocast_off(x):
            wide = x.to(self.weight.dtype)
            return F.layer_norm(wide, self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = _normed(x.flatten(0, -2), weight=weight, eps=eps)
        ctx.save_for_backward(x, weight, scale)
        return normed.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        d_x, d_weight = _gradients(grad.flatten(0, -2), x.flatten(0, -2), scale, weight=weight)
        return d_x.view(x.shape), d_weight, None


@leaf
def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight, and 1 / sqrt(mean(x^2) + eps): [T, D], [T, 1]."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    wide = x.to(weight.dtype)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).mul_(weight).to(x.dtype), scale


@leaf
def _gradients(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    grad, wide = grad.to(scale.dtype), weight.to(scale.dtype)
    normed = x.to(scale.dtype) * scale
    pull = grad * normed
    d_weight = pull.sum(0)
    along = pull.mul_(wide).mean(-1, keepdim=True)
    d_x = normed.mul_(-along).addcmul_(grad, wide).mul_(scale)
    return d_x.to(x.dtype), d_weight.to(weight.dtype)
