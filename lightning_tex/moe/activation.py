"""What stands between the experts' products, times the weights of the rows, forward and backward: leaf functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_tex.parallel.compiled import leaf
from lightning_tex.parallel.device import device_type

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
    by_row = _by_row(weights, up)
    return _gelu(up, by_row) if gate is None else _swiglu(up, gate, by_row)


def hidden_backward(grad: Tensor, up: Tensor, gate: Tensor | None, weights: Tensor) -> HiddenGradients:
    """The backward of :func:`hidden`."""
    by_row = _by_row(weights, up)
    if gate is None:
        value, d_up, d_weights = _gelu_backward(grad, up, by_row)
        return HiddenGradients(value, d_up, None, d_weights)
    return HiddenGradients(*_swiglu_backward(grad, up, gate, by_row))


def _by_row(weights: Tensor, like: Tensor) -> Tensor:  # [n] -> [n, 1]
    # A product of two dtypes is one pass on a GPU. On a CPU it makes copies of both in the wider one.
    return weights[:, None] if device_type(like) != "cpu" else weights[:, None].to(like.dtype)


@leaf
def _gelu(up: Tensor, by_row: Tensor) -> Tensor:
    return F.gelu(up).mul_(by_row)


@leaf
def _swiglu(up: Tensor, gate: Tensor, by_row: Tensor) -> Tensor:
    return F.silu(gate).mul_(up).mul_(by_row)


@leaf
def _gelu_backward(grad: Tensor, up: Tensor, by_row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value = F.gelu(up)
    d_weights = _row_sums(grad * value)
    d_up = aten.gelu_backward(grad, up).mul_(by_row)
    return value.mul_(by_row), d_up, d_weights


@leaf
def _swiglu_backward(grad: Tensor, up: Tensor, gate: Tensor, by_row: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    silu = F.silu(gate)
    value = silu * up
    d_weights = _row_sums(grad * value)
    d_value = (grad * by_row).to(grad.dtype)
    d_gate = aten.silu_backward(d_value * up, gate)
    return value.mul_(by_row), silu.mul_(d_value), d_gate, d_weights


def _row_sums(x: Tensor) -> Tensor:  # [n, H] -> [n]
    dtype = torch.promote_types(x.dtype, torch.float32)
    # It is summed in that dtype anyhow; asked for its result in it, a CPU makes a copy of all of x first.
    return x.sum(1).to(dtype) if x.device.type == "cpu" else x.sum(1, dtype=dtype)
