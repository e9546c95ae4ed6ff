"""A norm that keeps its weight and arithmetic in full precision among low-precision activations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` computed in its weight's dtype; the result has the input's dtype: [.., D] -> [.., D]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.eps).to(x.dtype)
