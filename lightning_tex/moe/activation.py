"""What stands between the experts' products, times the weights of the rows, forward and backward: leaf functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_tex.parallel.compiled import leaf

# n rows, H hidden width

aten = torch.ops.aten


class HiddenGradients(NamedTuple):
    """Of one backward.

    hidden:  [n, H] once more.
    up, gate: [n, H] gradients of the products; no gate with gelu.
    weights: [n] gradients of the rows' weights.
    """

    hidden: Tensor
    up: Tensor
    gate: Tensor | None
    weights: Tensor


def hidden(up: Tensor, gate: Tensor | None, weights: Tensor) -> Tensor:
    """``weights * gelu(up)`` or ``weights * silu(gate) * up``: [n, H], [n] -> [n, H]."""
    return _gelu(up, weights) if gate is None else _swiglu(up, gate, weights)


def hidden_backward(grad: Tensor, up: Tensor, gate: Tensor | None, weights: Tensor) -> HiddenGradients:
    """The backward of :func:`hidden`."""
    if gate is None:
        value, d_up, d_weights = _gelu_backward(grad, up, weights)
        return HiddenGradients(value, d_up, None, d_weights)
    return HiddenGradients(*_swiglu_backward(grad, up, gate, weights))


@leaf
def _gelu(up: Tensor, weights: Tensor) -> Tensor:
    return F.gelu(up).mul_(weights[:, None])


@leaf
def _swiglu(up: Tensor, gate: Tensor, weights: Tensor) -> Tensor:
    return F.silu(gate).mul_(up).mul_(weights[:, None])


@leaf
def _gelu_backward(grad: Tensor, up: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value, by_row = F.gelu(up), weights[:, None]
    d_weights = (grad * value).sum(1, dtype=weights.dtype)
    d_up = aten.gelu_backward(grad, up).mul_(by_row)
    return value.mul_(by_row), d_up, d_weights


@leaf
def _swiglu_backward(grad: Tensor, up: Tensor, gate: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    by_row = weights[:, None]
    silu = F.silu(gate)
    value = silu * up
    d_weights = (grad * value).sum(1, dtype=weights.dtype)
    weighted = grad * by_row.to(grad.dtype)
    d_gate = aten.silu_backward(weighted * up, gate)
    return value.mul_(by_row), silu.mul_(weighted), d_gate, d_weights
