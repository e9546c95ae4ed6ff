"""Floating-point operations of what a step computes: products only, 2 for each multiplication and addition."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


def _product_added(_: Tensor, left: Tensor, right: Tensor, **__: Any) -> int:
    return 2 * prod(left.shape) * right.shape[-1]


# torch's counter has no entry for these.
_MORE: dict[Any, Any] = {
    aten.addmm_: _product_added,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def operation_flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """FLOPs of one operation of torch; 0 where it is no product.

    Attention is counted whole, as torch's counter does: the causal half that kernels skip is in it.
    """
    packet = func.overloadpacket
    if packet is aten._grouped_mm:  # torch's counter knows its name and counts 0
        rows, matrices = args[:2]
        return 2 * prod(rows.shape) * matrices.shape[-1]
    if packet in _MORE:
        return int(_MORE[packet](*args, **kwargs))
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    return 0
