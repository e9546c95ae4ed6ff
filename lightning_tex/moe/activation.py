"""What stands between the experts' products, times the weights of the rows, forward and backward: leaf functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_tex.layers.mlp import ALPHA, LIMIT, Activation
from lightning_tex.parallel.compiled import leaf
from lightning_tex.parallel.device import device_type

# n rows, H hidden width

aten = torch.ops.aten


class HiddenGradients(NamedTuple):
    """Of one backward.

    hidden:  [n, H] once more.
    up, gate: [n, H] gradients of the products; no gate where the activation has none.
    weights: [n] gradients of the rows' weights.
    """

    hidden: Tensor
    up: Tensor
    gate: Tensor | None
    weights: Tensor


def hidden(up: Tensor, gate: Tensor | None, weights: Tensor, activation: Activation) -> Tensor:
    """``weights`` times what :func:`lightning_tex.layers.mlp.activated` gives: [n, H], [n] -> [n, H]."""
    by_row = _by_row(weights, up)
    if gate is None:
        return _relu(up, by_row) if activation == "relu" else _gelu(up, by_row, _approximate(activation))
    if activation == "swiglu":
        return _swiglu(up, gate, by_row)
    if activation == "clamped_swiglu":
        return _clamped(up, gate, by_row)
    return _geglu(up, gate, by_row, _approximate(activation))


def hidden_backward(
    grad: Tensor, up: Tensor, gate: Tensor | None, weights: Tensor, activation: Activation
) -> HiddenGradients:
    """The backward of :func:`hidden`."""
    by_row = _by_row(weights, up)
    if gate is None:
        if activation == "relu":
            value, d_up, d_weights = _relu_backward(grad, up, by_row)
        else:
            value, d_up, d_weights = _gelu_backward(grad, up, by_row, _approximate(activation))
        return HiddenGradients(value, d_up, None, d_weights)
    if activation == "swiglu":
        return HiddenGradients(*_swiglu_backward(grad, up, gate, by_row))
    if activation == "clamped_swiglu":
        return HiddenGradients(*_clamped_backward(grad, up, gate, by_row))
    return HiddenGradients(*_geglu_backward(grad, up, gate, by_row, _approximate(activation)))


def _approximate(activation: Activation) -> str:
    return "tanh" if activation.endswith("tanh") else "none"


def _by_row(weights: Tensor, like: Tensor) -> Tensor:  # [n] -> [n, 1]
    # A product of two dtypes is one pass on a GPU. On a CPU it makes copies of both in the wider one.
    return weights[:, None] if device_type(like) != "cpu" else weights[:, None].to(like.dtype)


@leaf
def _gelu(up: Tensor, by_row: Tensor, approximate: str) -> Tensor:
    return F.gelu(up, approximate=approximate).mul_(by_row)


@leaf
def _relu(up: Tensor, by_row: Tensor) -> Tensor:
    return F.relu(up).mul_(by_row)


@leaf
def _swiglu(up: Tensor, gate: Tensor, by_row: Tensor) -> Tensor:
    return F.silu(gate).mul_(up).mul_(by_row)


@leaf
def _geglu(up: Tensor, gate: Tensor, by_row: Tensor, approximate: str) -> Tensor:
    return F.gelu(gate, approximate=approximate).mul_(up).mul_(by_row)


@leaf
def _clamped(up: Tensor, gate: Tensor, by_row: Tensor) -> Tensor:
    gate = gate.clamp(max=LIMIT)
    return (gate * ALPHA).sigmoid_().mul_(gate).mul_(up.clamp(-LIMIT, LIMIT).add_(1)).mul_(by_row)


@leaf
def _gelu_backward(grad: Tensor, up: Tensor, by_row: Tensor, approximate: str) -> tuple[Tensor, Tensor, Tensor]:
    value = F.gelu(up, approximate=approximate)
    d_weights = _row_sums(grad * value)
    d_up = aten.gelu_backward(grad, up, approximate=approximate).mul_(by_row)
    return value.mul_(by_row), d_up, d_weights


@leaf
def _relu_backward(grad: Tensor, up: Tensor, by_row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value = F.relu(up)
    d_weights = _row_sums(grad * value)
    d_up = grad.masked_fill(up <= 0, 0).mul_(by_row)
    return value.mul_(by_row), d_up, d_weights


@leaf
def _swiglu_backward(grad: Tensor, up: Tensor, gate: Tensor, by_row: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    silu = F.silu(gate)
    value = silu * up
    d_weights = _row_sums(grad * value)
    d_value = (grad * by_row).to(grad.dtype)
    d_gate = aten.silu_backward(d_value * up, gate)
    return value.mul_(by_row), silu.mul_(d_value), d_gate, d_weights


@leaf
def _geglu_backward(
    grad: Tensor, up: Tensor, gate: Tensor, by_row: Tensor, approximate: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gelu = F.gelu(gate, approximate=approximate)
    value = gelu * up
    d_weights = _row_sums(grad * value)
    d_value = (grad * by_row).to(grad.dtype)
    d_gate = aten.gelu_backward(d_value * up, gate, approximate=approximate)
    return value.mul_(by_row), gelu.mul_(d_value), d_gate, d_weights


@leaf
def _clamped_backward(grad: Tensor, up: Tensor, gate: Tensor, by_row: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    low, linear = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT).add_(1)
    sigmoid = (low * ALPHA).sigmoid_()
    glu = low * sigmoid
    value = glu * linear
    d_weights = _row_sums(grad * value)
    d_value = (grad * by_row).to(grad.dtype)
    slope = (1 - sigmoid).mul_(low).mul_(ALPHA).add_(1).mul_(sigmoid)
    d_gate = slope.mul_(linear).mul_(d_value).masked_fill_(gate > LIMIT, 0)
    d_up = glu.mul_(d_value).masked_fill_(up.abs() > LIMIT, 0)
    return value.mul_(by_row), d_up, d_gate, d_weights


def _row_sums(x: Tensor) -> Tensor:  # [n, H] -> [n]
    dtype = torch.promote_types(x.dtype, torch.float32)
    # It is summed in that dtype anyhow; asked for its result in it, a CPU makes a copy of all of x first.
    return x.sum(1).to(dtype) if x.device.type == "cpu" else x.sum(1, dtype=dtype)
