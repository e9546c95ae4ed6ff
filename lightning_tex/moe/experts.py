"""The experts' matrices, spread over the expert axis and sharded over the expert_tensor axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_tex.layers.mlp import GATED, Activation, require_activation
from lightning_tex.moe.activation import hidden
from lightning_tex.moe.adapters import ExpertAdapter, ExpertDownAdapter, ExpertUpAdapter
from lightning_tex.moe.chunks import BlockInChunks
from lightning_tex.moe.dispatch import Arrived
from lightning_tex.moe.exchange import ChunkedExchange
from lightning_tex.moe.expert_block import ExpertBlock, Kept, Matrices, RowsAtOnce, Wanted
from lightning_tex.moe.groups import Groups
from lightning_tex.moe.held_experts import HeldExperts
from lightning_tex.moe.local_block import LocalAtOnce, LocalByExpert
from lightning_tex.moe.products import LoopedProducts, Products
from lightning_tex.moe.rounds import BlockInRounds
from lightning_tex.parallel.autocast import autocast_dtype, autocast_off
from lightning_tex.parallel.device import device_type
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.flight_record import TRAINING
from lightning_tex.parallel.initialization import by_index, init_uniform_
from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.replay import outside_replay

# N rows, D model width, H hidden width, E experts, e experts held here (per rank: H/expert_tensor), t own tokens


class Experts(HeldExperts):
    """E feed-forward blocks as stacked matrices: [t, D] tokens -> [t, D] sums over a token's choices.

    Each row's hidden units are multiplied with its weight. Sharded over expert_tensor, each rank computes partial sums;
    the exchange sums them on the way back, and the input's partial gradients likewise.

    Args:
        dim: D.
        hidden_dim: H; divisible by the expert_tensor axis.
        num_experts: E; divisible by the expert axis.
        activation: see :class:`lightning_tex.layers.ParallelMLP`; with a gate there are three matrices, else two.
        bias: biases of the first matrices; of the last one's see :class:`lightning_tex.moe.output_biases.OutputBiases`.
    """

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
    adapter_types: ClassVar[Mapping[str, type[ExpertAdapter]]] = {
        "gate": ExpertUpAdapter,
        "up": ExpertUpAdapter,
        "down": ExpertDownAdapter,
    }
    adapters: nn.ModuleDict | None

    def __init__(
        self, dim: int, hidden_dim: int, num_experts: int, activation: Activation = "gelu", bias: bool = False
    ) -> None:
        super().__init__(dim, num_experts)
        require_activation(activation)
        self.hidden_dim, self.activation = hidden_dim, activation
        gated, shape = activation in GATED, (num_experts, hidden_dim, dim)
        self.up_bias = nn.Parameter(torch.empty(num_experts, hidden_dim)) if bias else None
        self.gate_bias = nn.Parameter(torch.empty(num_experts, hidden_dim)) if bias and gated else None
        self.gate = nn.Parameter(torch.empty(shape)) if gated else None
        self.up = nn.Parameter(torch.empty(shape))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.adapters = None
        self.reset_parameters()

    def require_shardable(self, layer: str, layout: Layout) -> None:
        super().require_shardable(layer, layout)
        if self.hidden_dim % layout.expert_tensor:
            raise UserValueError(
                f"{layer}: hidden_dim={self.hidden_dim} is not divisible by expert_tensor_parallel_size="
                f"{layout.expert_tensor}; choose a tensor_parallel_size that divides it, or "
                "expert_tensor_parallel_size=1"
            )

    @property
    def matrices(self) -> Matrices:
        """Those held here, adapted where they have adapters (by name, in ``adapters``)."""
        named = {"up": self.up, "gate": self.gate, "down": self.down}
        for name, adapter in ({} if self.adapters is None else self.adapters).items():
            named[name] = adapter(named[name])
        return Matrices(**named, up_bias=self.up_bias, gate_bias=self.gate_bias)  # type: ignore[arg-type]

    @by_index
    def reset_parameters(self) -> None:
        """Draw each expert as ``torch.nn.Linear`` would: uniform within 1/sqrt(input width)."""
        boxes = self.boxes()
        for name, parameter in self.named_parameters(recurse=False):
            width = self.hidden_dim if name == "down" else self.dim
            init_uniform_(parameter, 1 / math.sqrt(width), boxes[name])

    def forward(self, arrived: Arrived, beside: Callable[[], object] | None = None) -> Tensor:
        call = _Call(self._block(arrived), autocast_dtype(arrived.tokens))
        tie = _Inward.apply(_Depart.apply(arrived.tokens, arrived.weights, call), *self.matrices, call)
        if beside is not None:
            beside()
        return _Outward.apply(tie, call)

    def _block(self, arrived: Arrived) -> ExpertBlock:
        exchange = arrived.exchange

        def of_rows(groups: Groups) -> RowsAtOnce:
            matrices = [m for m in (self.up, self.gate, self.down) if m is not None]
            return RowsAtOnce(Products.of(groups, autocast_dtype(arrived.tokens), matrices), self.activation)

        if isinstance(exchange, ChunkedExchange):
            return (BlockInChunks if exchange.kept else BlockInRounds)(exchange, of_rows)
        if device_type(arrived.tokens) == "cpu":
            return LocalByExpert(exchange, self.activation)
        return LocalAtOnce(exchange, of_rows(exchange.groups))

    @torch.no_grad()
    def own_outputs(self, arrived: Arrived) -> Iterator[Tensor]:
        dtype = autocast_dtype(arrived.tokens)
        matrices = self.matrices.to(dtype)
        with outside_replay():
            chunks = [LoopedProducts(c.groups).parts(c.rows.to(dtype), c.weights) for c in arrived.by_chunk()]
        for own, *parts in zip(matrices.of_each(len(self.up)), *chunks, strict=True):
            rows, weights = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            with autocast_off(rows):
                up, gate = _affine(rows, own.up, own.up_bias), None
                if own.gate is not None:
                    gate = _affine(rows, own.gate, own.gate_bias)
                output = hidden(up, gate, weights, self.activation) @ own.down.mT
            yield output

    def extra_repr(self) -> str:
        sizes = f"{self.num_experts} x ({self.dim} -> {self.hidden_dim} -> {self.dim})"
        return f"{sizes}, {self.activation}{', biases' if self.up_bias is not None else ''}"


def _affine(rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return rows @ matrix.mT if bias is None else rows @ matrix.mT + bias


class _Call:
    """One forward of a block, and what its nodes in the graph give each other.

    Args:
        block: computes.
        dtype: in which.
    """

    def __init__(self, block: ExpertBlock, dtype: torch.dtype) -> None:
        self.block, self.dtype = block, dtype
        self.kept: tuple[list[Kept], Matrices] | None = None
        self.wanted = (False, False)


class _Depart(torch.autograd.Function):
    """Rows set out; in the backward, gradients of tokens and weights are waited for.

    Its result is a tensor without elements, as is that of the next node: they tie the three nodes together.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, call: _Call) -> Tensor:
        ctx.call, ctx.dtypes = call, (x.dtype, weights.dtype)
        call.wanted = ctx.needs_input_grad[:2]
        with autocast_off(x):
            call.block.depart(x.to(call.dtype), weights)
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.call.block.arrive_backward()
        return (*(None if g is None else g.to(d) for g, d in zip(gradients, ctx.dtypes, strict=True)), None)


class _Inward(torch.autograd.Function):
    """The first products, and all that is kept: a recomputation ends here, before the last product."""

    @staticmethod
    def forward(ctx: Any, tie: Tensor, *parameters_and_call: Any) -> Tensor:
        *parameters, call = parameters_and_call
        ctx.call = call
        with autocast_off(tie):
            matrices = Matrices(*parameters).to(call.dtype)
            kept = call.block.inward(matrices)
        call.kept = kept, matrices
        ctx.save_for_backward(*parameters, *chain.from_iterable(kept))
        return tie.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        held, tensors = len(Matrices._fields), ctx.saved_tensors
        call, matrices, tensors = ctx.call, Matrices(*tensors[:held]), tensors[held:]
        kept = [Kept(*tensors[i : i + len(Kept._fields)]) for i in range(0, len(tensors), len(Kept._fields))]
        del tensors
        with autocast_off(matrices.up):
            wanted = Wanted(*call.wanted, *ctx.needs_input_grad[1:-1])
            found = call.block.backward(kept, matrices.to(call.dtype), wanted)
            of_matrices = zip(found.all(), matrices, strict=True)
            gradients = [None if g is None or m is None else g.to(m.dtype) for g, m in of_matrices]
        tie = matrices.up.new_empty(0) if ctx.needs_input_grad[0] else None
        return (tie, *gradients, None)


class _Outward(torch.autograd.Function):
    """The rest of the block; in the backward, gradients set out."""

    @staticmethod
    def forward(ctx: Any, tie: Tensor, call: _Call) -> Tensor:
        ctx.call = call
        ctx.layer = TRAINING.layer
        assert call.kept is not None
        kept, matrices = call.kept
        call.kept = None
        with autocast_off(tie):
            return call.block.outward(kept, matrices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        TRAINING.layer = ctx.layer
        ctx.call.block.depart_backward(grad)
        return grad.new_empty(0), None
