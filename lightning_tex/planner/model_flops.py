"""Model FLOPs, by which MFU is usually measured.

They are three forwards (a forward, and a backward of twice that) of every product on whole matrices, attention over
whole squares, or a window's whole width. What a rank computes besides (recomputation, equal work on tensor ranks,
imbalance) takes time and is no model FLOP.
"""

from __future__ import annotations

from lightning_tex.planner.layers import (
    Attention,
    ColumnLinear,
    Head,
    LatentAttention,
    Layer,
    Linear,
    Mlp,
    Moe,
    RowLinear,
)
from lightning_tex.planner.layouts import Job
from lightning_tex.planner.model import ModelDescription


def model_flops(job: Job) -> float:
    """FLOPs of one optimizer step over all ranks: three forwards of every product, attention over whole squares."""
    return job.tokens * token_flops(job.model, job.sequence_length)


def token_flops(model: ModelDescription, length: int) -> float:
    """FLOPs of training on one token of a sequence of that length; each layer is taken to be applied to it once."""
    return sum(count * layer_flops(placed.layer, length) for placed, count in model.layer_counts.items())


def layer_flops(layer: Layer, length: int) -> float:
    """Likewise, of one layer: three forwards of two operations for each multiplication."""
    return 3.0 * 2 * _multiplications(layer, length)


def _multiplications(layer: Layer, length: int) -> int:
    """Multiplications and additions of a layer's forward for one token, on whole matrices."""
    match layer:
        case Attention():
            kv = layer.num_kv_heads * layer.head_dim
            return (
                2 * layer.dim * layer.inner + 2 * layer.dim * kv + 2 * min(length, layer.window or length) * layer.inner
            )
        case LatentAttention():
            made = sum(width * made for width, made in (*layer.latents, *layer.columns))
            widths = layer.num_heads * (layer.head_dim + layer.v_head_dim)
            return made + length * widths + layer.num_heads * layer.v_head_dim * layer.dim
        case Mlp():
            return (layer.matrices_up + 1) * layer.dim * layer.hidden
        case Moe():
            chosen = (layer.matrices_up + 1) * layer.dim * layer.hidden * layer.top_k + layer.dim * layer.scored
            return chosen + (0 if layer.shared is None else _multiplications(layer.shared, length))
        case Head():
            return layer.dim * layer.vocab_size
        case ColumnLinear() | RowLinear() | Linear():
            return layer.in_features * layer.out_features
    return 0
