"""A norm that keeps its weight and arithmetic in full precision among low-precision activations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` computed in its weight's dtype; the result has the input's dtype: [.., D] -> [.., D]."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(self.weight.dtype)
        plain = x.device.type != "cpu" or self.eps is None or len(self.normalized_shape) > 1
        if plain or y.dtype in (torch.bfloat16, torch.float16):  # torch computes those in fp32
            return F.rms_norm(y, self.normalized_shape, self.weight, self.eps).to(x.dtype)
        return _RMSNorm.apply(y, self.weight, self.eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight. Torch has one kernel for it on GPUs, and on CPU a chain of small ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        pull = grad * normed
        along = (pull @ weight)[..., None] / x.shape[-1]
        return (grad * weight).addcmul_(normed, along, value=-1).mul_(scale), pull.flatten(0, -2).sum(0), None
