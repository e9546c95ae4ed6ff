"""Experts of a module class of one's own: one module for each expert, stacked and spread over the expert axis."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from lightning_tex.moe.dispatch import Arrived
from lightning_tex.moe.exchange import ChunkedExchange, Exchange, LocalExchange
from lightning_tex.moe.groups import Groups
from lightning_tex.moe.held_experts import HeldExperts
from lightning_tex.moe.named import class_named, taken_apart
from lightning_tex.parallel.autocast import autocast_dtype
from lightning_tex.parallel.errors import UserTypeError, UserValueError
from lightning_tex.parallel.hashing import stable_hash
from lightning_tex.parallel.initialization import by_index, has_values
from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.replay import outside_replay
from lightning_tex.parallel.started import UnderWay, started

# N rows, D model width, E experts, e experts held here, t own tokens, k choices per token

# What makes an expert of (dim, hidden_dim); or its import path, alone or with arguments, {"name": .., "init_args": ..}.
ExpertChoice = Callable[[int, int], nn.Module] | str | Mapping[str, Any]


def expert_maker(choice: ExpertChoice, dim: int, hidden_dim: int) -> Callable[[], nn.Module]:
    """What makes one expert.

    Raises:
        ValueError: a name that is no module's class.
    """
    if callable(choice):
        return lambda: choice(dim, hidden_dim)
    name, given = taken_apart(choice, "expert_module")
    kind = class_named(name, nn.Module)
    if kind is None:
        raise UserValueError(
            f"expert_module={name!r}; legal: the import path of a class of torch.nn.Module, or what makes one of "
            "(dim, hidden_dim)"
        )
    return lambda: kind(dim, hidden_dim, **given)


class OwnExperts(HeldExperts):
    """E modules of one class as stacked parameters: [t, D] tokens -> [t, D] sums over a token's choices.

    The module's parameter ``a.b`` of all experts is the parameter ``a_b``, [E, ..], which is sharded over the expert
    axis alone: an expert is whole on its rank. Expert e begins as ``make()`` under a seed of its own, alike on every
    layout. Its rows [N, D] go in together, zero rows too, and [N, D] come out; what else there is in them is the
    module's.

    Args:
        dim: D.
        num_experts: E; divisible by the expert axis.
        make: makes one expert, with parameters of the same shapes every time.

    Raises:
        ValueError: a module without parameters, or with buffers that are saved, which no rank could have of its own.
    """

    def __init__(self, dim: int, num_experts: int, make: Callable[[], nn.Module]) -> None:
        super().__init__(dim, num_experts)
        self._make = make
        with torch.device("meta"):
            template = make()
        if not isinstance(template, nn.Module):
            raise UserTypeError(f"expert_module made {type(template).__name__}; legal: a torch.nn.Module")
        self._names = {name.replace(".", "_"): name for name, _ in template.named_parameters()}
        if not self._names or len(self._names) < len(list(template.parameters())):
            raise UserValueError(
                f"{type(template).__name__} has parameters {', '.join(self._names.values()) or '(none)'}; legal: one "
                "or more, whose names differ with _ for ."
            )
        if buffers := [name for name, _ in template.named_buffers()]:
            raise UserValueError(
                f"{type(template).__name__} has buffers {', '.join(buffers)}, which would not be a rank's own; legal: "
                "parameters alone, or values that forward makes"
            )
        self._template = (template,)  # in a tuple: it has no values, and is no part of the model
        for own, name in self._names.items():
            like = template.get_parameter(name)
            stacked = torch.empty(num_experts, *like.shape, dtype=like.dtype)
            self.register_parameter(own, nn.Parameter(stacked, like.requires_grad))
        self.shard_dims = {own: {"expert": 0} for own in self._names}  # type: ignore[misc]
        self.reset_parameters()

    def require_shardable(self, layer: str, layout: Layout) -> None:
        super().require_shardable(layer, layout)
        if layout.expert_tensor > 1:
            raise UserValueError(
                f"{layer}: experts of expert_module are whole, and not sharded over expert_tensor_parallel_size="
                f"{layout.expert_tensor}; legal: expert_tensor_parallel_size=1"
            )

    @by_index
    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make each expert that is held here anew, and take its values."""
        key = int(torch.randint(2**62, (), device="cpu"))
        stacked = {own: getattr(self, own) for own in self._names}
        if not all(map(has_values, stacked.values())):
            return
        for place, number in enumerate(self.held):
            drawn = self._drawn(stable_hash(key, number))
            for own, name in self._names.items():
                stacked[own][place].copy_(drawn.get_parameter(name))

    def _drawn(self, seed: int) -> nn.Module:
        """An expert in fp32 on the CPU: other dtypes and devices draw other numbers."""
        default = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.float32)
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.manual_seed(seed)
                return self._make()
        finally:
            torch.set_default_dtype(default)

    def forward(self, arrived: Arrived, beside: Callable[[], object] | None = None) -> Tensor:
        exchange = arrived.exchange
        chunked = exchange if isinstance(exchange, ChunkedExchange) else ChunkedExchange([exchange])
        tokens = arrived.tokens.to(autocast_dtype(arrived.tokens))
        parts = chunked.split(tokens), chunked.split(arrived.weights)
        outputs = []
        for chunk, x, weights in zip(chunked.chunks, *parts, strict=True):
            rows = _Exchanged.apply(x, chunk, _TO_EXPERTS)
            of_rows = _Exchanged.apply(weights, chunk, _WEIGHTS)
            outputs.append(torch.cat([y for _, y in self._outputs(rows, of_rows, chunk.groups)]).to(x.dtype))
        # After all that is kept: a recomputation ends before.
        sums = [
            _Exchanged.apply(rows, chunk, _FROM_EXPERTS) for rows, chunk in zip(outputs, chunked.chunks, strict=True)
        ]
        if beside is not None:
            beside()
        return torch.cat(sums) if chunked.tokens is not None else torch.stack(sums).sum(0)

    @torch.no_grad()
    def own_outputs(self, arrived: Arrived) -> Iterator[Tensor]:
        with outside_replay():
            chunks = list(arrived.by_chunk())
        dtype = autocast_dtype(arrived.tokens)
        of_chunks = [dict(self._outputs(c.rows.to(dtype), c.weights, c.groups)) for c in chunks]
        for place in range(len(self.held)):
            yield torch.cat([outputs[place] for outputs in of_chunks])

    def _outputs(self, rows: Tensor, weights: Tensor, groups: Groups) -> Iterator[tuple[int, Tensor]]:
        """Each expert's place, and what it gives for its rows, times their weights."""
        (template,) = self._template
        template.train(self.training)
        of_experts = {name: getattr(self, own).unbind() for own, name in self._names.items()}
        for place, (x, w) in enumerate(zip(rows.split(groups.sizes), weights.split(groups.sizes), strict=True)):
            y = functional_call(template, {name: each[place] for name, each in of_experts.items()}, (x,))
            if y.shape != x.shape:
                raise UserValueError(
                    f"{type(template).__name__} gave {list(y.shape)} for {list(x.shape)}; legal: as many rows, as wide"
                )
            yield place, y * w[:, None]

    def extra_repr(self) -> str:
        (template,) = self._template
        return f"{self.num_experts} x {type(template).__name__}"


class _Way(NamedTuple):
    """A linear map of an exchange between own tokens and rows at the experts, and its transpose."""

    name: str
    forth: Callable[[Exchange, Tensor], UnderWay[Tensor]]
    back: Callable[[Exchange, Tensor], UnderWay[Tensor]]


# [t, D] -> [N, D], the rows of tokens
_TO_EXPERTS = _Way("exchange to experts", Exchange.start_to_experts, Exchange.start_from_experts)
# [t, k] -> [N], a weight of each choice
_WEIGHTS = _Way("exchange of weights", Exchange.start_choices_to_experts, Exchange.start_choices_from_experts)
# [N, D] -> [t, D], the sums over each token's choices
_FROM_EXPERTS = _Way("exchange from experts", Exchange.start_from_experts, Exchange.start_to_experts)


class _Exchanged(torch.autograd.Function):
    """What a way gives, on the tape where anything passes between ranks; the transpose in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange, way: _Way) -> Tensor:
        ctx.exchange, ctx.way = exchange, way
        if isinstance(exchange, LocalExchange):
            return way.forth(exchange, x).wait()
        return started(way.name, x, lambda: way.forth(exchange, x)).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.way.back(ctx.exchange, grad.contiguous()).wait(), None, None
