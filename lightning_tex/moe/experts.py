"""The experts' matrices, spread over the expert axis and sharded over the expert_tensor axis."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_tex.layers.mlp import GATED, Activation, require_activation
from lightning_tex.moe.activation import hidden
from lightning_tex.moe.dispatch import Arrived, LocalRows, RowsInRounds
from lightning_tex.moe.exchange import Exchange, from_experts
from lightning_tex.moe.expert_block import BlockByExpert, BlockOfRows, ExpertBlock, Gradients, Kept, Matrices
from lightning_tex.moe.groups import Groups
from lightning_tex.moe.products import LoopedProducts, Products
from lightning_tex.moe.rounds import BlockInRounds
from lightning_tex.parallel.autocast import autocast_dtype, autocast_off
from lightning_tex.parallel.device import device_type
from lightning_tex.parallel.initialization import by_index, init_uniform_
from lightning_tex.parallel.replay import replaying
from lightning_tex.parallel.sharding import TexModule

# N rows, D model width, H hidden width, E experts, e experts held here (per rank: H/expert_tensor), t own tokens


class Experts(TexModule):
    """E feed-forward blocks as stacked matrices: [N, D] rows grouped by expert -> [t, D] sums over a token's choices.

    Each row's hidden units are multiplied with its weight. Sharded over expert_tensor, each rank computes partial sums;
    the exchange sums them on the way back, and the input's partial gradients likewise.

    Args:
        dim: D.
        hidden_dim: H; divisible by the expert_tensor axis.
        num_experts: E; divisible by the expert axis.
        activation: see :class:`lightning_tex.layers.ParallelMLP`; with a gate there are three matrices, else two.
        bias: biases of the first matrices; of the last one's see :class:`lightning_tex.moe.output_biases.OutputBiases`.
    """

    axes = ("expert", "expert_tensor")
    shard_dims = {
        "gate": {"expert": 0, "expert_tensor": 1},
        "up": {"expert": 0, "expert_tensor": 1},
        "down": {"expert": 0, "expert_tensor": 2},
        "up_bias": {"expert": 0, "expert_tensor": 1},
        "gate_bias": {"expert": 0, "expert_tensor": 1},
    }
    gate: nn.Parameter | None
    up_bias: nn.Parameter | None
    gate_bias: nn.Parameter | None

    def __init__(
        self, dim: int, hidden_dim: int, num_experts: int, activation: Activation = "gelu", bias: bool = False
    ) -> None:
        super().__init__()
        require_activation(activation)
        self.dim, self.hidden_dim, self.num_experts, self.activation = dim, hidden_dim, num_experts, activation
        gated, shape = activation in GATED, (num_experts, hidden_dim, dim)
        self.up_bias = nn.Parameter(torch.empty(num_experts, hidden_dim)) if bias else None
        self.gate_bias = nn.Parameter(torch.empty(num_experts, hidden_dim)) if bias and gated else None
        self.gate = nn.Parameter(torch.empty(shape)) if gated else None
        self.up = nn.Parameter(torch.empty(shape))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.reset_parameters()

    @property
    def matrices(self) -> Matrices:
        """Those held here."""
        return Matrices(self.up, self.gate, self.down, self.up_bias, self.gate_bias)

    @by_index
    def reset_parameters(self) -> None:
        """Draw each expert as ``torch.nn.Linear`` would: uniform within 1/sqrt(input width)."""
        boxes = self.boxes()
        for name, parameter in self.named_parameters(recurse=False):
            width = self.hidden_dim if name == "down" else self.dim
            init_uniform_(parameter, 1 / math.sqrt(width), boxes[name])

    def forward(self, arrived: Arrived, exchange: Exchange) -> Tensor:
        """What the experts give for the rows that arrived, brought back by the exchange: [N, D] -> [t, D].

        Rows that are picked from the own tokens are so again in the backward, and not kept.
        """
        x, weights, block, home = self._plan(arrived)
        call = _Call(block, autocast_dtype(x), last_product=home or not replaying())
        y = _Outward.apply(_Inward.apply(x, weights, *self.matrices, call), call)
        return y if home else from_experts(y, exchange)

    def _plan(self, arrived: Arrived) -> tuple[Tensor, Tensor, ExpertBlock, bool]:
        """What is computed from, with which weights, how, and whether what it gives is home."""

        def at_once(groups: Groups, local: Exchange | None = None) -> BlockOfRows:
            matrices = [m for m in (self.up, self.gate, self.down) if m is not None]
            return BlockOfRows(Products.of(groups, autocast_dtype(x), matrices), self.activation, local)

        if isinstance(arrived, RowsInRounds):
            x = arrived.tokens
            return x, arrived.choice_weights, BlockInRounds(arrived.exchange.rounds, at_once), True
        if isinstance(arrived, LocalRows):
            x, local = arrived.tokens, arrived.exchange
            on_cpu = device_type(x) == "cpu"
            return (
                x,
                arrived.weights,
                BlockByExpert(local, self.activation) if on_cpu else at_once(local.groups, local),
                True,
            )
        x = arrived.rows
        return x, arrived.weights, at_once(arrived.groups), False

    @torch.no_grad()
    def own_outputs(self, arrived: Arrived) -> Iterator[Tensor]:
        """What the experts held here give by themselves, one after another: partial sums over expert_tensor."""
        rows, weights = arrived.rows, arrived.weights
        dtype = autocast_dtype(rows)
        matrices, parts = self.matrices.to(dtype), LoopedProducts(arrived.groups).parts(rows.to(dtype), weights)
        for (part, weight), own in zip(parts, matrices.of_each(len(parts)), strict=True):
            with autocast_off(rows):
                up, gate = _affine(part, own.up, own.up_bias), None
                if own.gate is not None:
                    gate = _affine(part, own.gate, own.gate_bias)
                output = hidden(up, gate, weight, self.activation) @ own.down.mT
            yield output

    def extra_repr(self) -> str:
        sizes = f"{self.num_experts} x ({self.dim} -> {self.hidden_dim} -> {self.dim})"
        return f"{sizes}, {self.activation}{', biases' if self.up_bias is not None else ''}"


def _affine(rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return rows @ matrix.mT if bias is None else rows @ matrix.mT + bias


class _Call:
    """One forward of a block, and what its two nodes in the graph give each other.

    Args:
        block: computes.
        dtype: in which.
        last_product: whether it is computed; where not, nobody looks at it.
    """

    def __init__(self, block: ExpertBlock, dtype: torch.dtype, last_product: bool = True) -> None:
        self.block, self.dtype, self.last_product = block, dtype, last_product
        self.kept: tuple[Kept, Matrices] | None = None
        self.grad: Tensor | None = None


class _Inward(torch.autograd.Function):
    """The first products, and all that is kept: a recomputation ends here, before the last product.

    Its result is a tensor without elements, which ties :class:`_Outward` to it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, *parameters_and_call: Any) -> Tensor:
        *parameters, call = parameters_and_call
        ctx.call = call
        with autocast_off(x):
            matrices, tokens = Matrices(*parameters).to(call.dtype), x.to(call.dtype)
            products = call.block.inward(tokens, matrices)
        call.kept = Kept(tokens, weights, *products), matrices
        ctx.save_for_backward(x, weights, *products, *parameters)
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, inward, gated, *parameters = ctx.saved_tensors
        call, matrices = ctx.call, Matrices(*parameters)
        grad, call.grad = call.grad, None
        with autocast_off(x):
            kept = Kept(x.to(call.dtype), weights, inward, gated)
            wanted = Matrices(*ctx.needs_input_grad[2:-1])
            found: Gradients = call.block.backward(grad, kept, matrices.to(call.dtype), wanted)
            like = (x, weights, *matrices)
            gradients = [None if g is None else g.to(t.dtype) for g, t in zip(found, like, strict=True)]
        return (*gradients, None)


class _Outward(torch.autograd.Function):
    """The rest of the block; in the backward it only passes the gradient on."""

    @staticmethod
    def forward(ctx: Any, tie: Tensor, call: _Call) -> Tensor:
        ctx.call = call
        assert call.kept is not None
        kept, matrices = call.kept
        call.kept = None
        if not call.last_product:
            return kept.x.new_zeros(()).expand(kept.x.shape)
        with autocast_off(tie):
            return call.block.outward(kept, matrices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.call.grad = grad
        return grad.new_empty(0), None
