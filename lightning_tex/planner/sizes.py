"""A decoder as sizes: every parameter that a rank holds, from the numbers of its configuration alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from math import prod
from typing import Any, Literal, NamedTuple

from lightning_tex.errors import UserValueError
from lightning_tex.parallel.precision import PRECISIONS
from lightning_tex.parallel.sharding import Box
from lightning_tex.parallel.topology import Axis, Layout

# Bytes of a number: of parameters and activations, and of the parameters that mixed precision keeps in fp32.
ELEMENT_BYTES = {name: (usual.itemsize, full.itemsize) for name, (usual, full) in PRECISIONS.items()}
_TENSOR_0, _TENSOR_1 = {"tensor": 0}, {"tensor": 1}
_UP, _DOWN = {"expert": 0, "expert_tensor": 1}, {"expert": 0, "expert_tensor": 2}

Kind = Literal["cut", "uncut", "expert"]


class Parameter(NamedTuple):
    """One parameter of a model.

    Args:
        name: in the decoder.
        shape: the whole one.
        cuts: axis name -> tensor dim, as the layer declares it.
        full_precision: a norm's or router's, which mixed precision keeps in fp32.
    """

    name: str
    shape: tuple[int, ...]
    shard_dims: Mapping[str, int]
    full_precision: bool = False

    @property
    def kind(self) -> Kind:
        """How the ranks share it: sharded over tensor, on all tensor ranks alike, or spread over expert."""
        return "expert" if "expert" in self.shard_dims else "cut" if self.shard_dims else "uncut"

    @property
    def numel(self) -> int:
        """Elements of the whole."""
        return prod(self.shape)

    def stored(self, layout: Layout) -> int:
        """Elements that a rank stores, padding included; all ranks store equally many."""
        cuts = [(Axis(axis, getattr(layout, axis)), dim) for axis, dim in self.shard_dims.items()]
        return prod(Box.of(self.shape, cuts).stored)


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a :class:`lightning_tex.models.Decoder`; see its ``DecoderConfig`` for what each is.

    Raises:
        ValueError: sizes that no decoder has, naming the option and what is legal.
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    hidden_dim: int | None = None
    num_experts: int = 1
    top_k: int = 1
    capacity_factor: float | None = None
    moe_every: int = 2
    activation: str = "gelu"
    tie_embeddings: bool = True
    load_balance_coefficient: float = 0.01
    z_loss_coefficient: float = 0.0
    norm_topk_prob: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "num_layers", "num_heads", "num_experts", "top_k", "moe_every"):
            _at_least_one(name, getattr(self, name))
        for name in ("num_kv_heads", "hidden_dim"):
            if getattr(self, name) is not None:
                _at_least_one(name, getattr(self, name))
        if self.dim % self.num_heads or self.dim // self.num_heads % 2:
            raise UserValueError(f"dim={self.dim} must be an even multiple of num_heads={self.num_heads}")
        if self.num_heads % self.kv_heads:
            raise UserValueError(f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.kv_heads}")
        if self.top_k > self.num_experts:
            raise UserValueError(f"top_k={self.top_k} must be between 1 and num_experts={self.num_experts}")
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise UserValueError(
                f"capacity_factor={self.capacity_factor} must be positive, or None for dropless routing"
            )
        if self.activation not in ("gelu", "swiglu"):
            raise UserValueError(f"activation={self.activation!r}; legal: 'gelu', 'swiglu'")

    @classmethod
    def of(cls, config: Any) -> ModelSizes:
        """The sizes of a ``DecoderConfig``, or of anything that has its attributes."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def hidden(self) -> int:
        return self.hidden_dim or 4 * self.dim

    @property
    def moe_layers(self) -> int:
        """Blocks with experts: the last of each ``moe_every``."""
        return self.num_layers // self.moe_every if self.num_experts > 1 else 0

    @property
    def dense_layers(self) -> int:
        return self.num_layers - self.moe_layers

    @property
    def experts(self) -> list[int]:
        """Number of experts of each MoE layer, as ``Layout.resolve`` takes it."""
        return [self.num_experts] * self.moe_layers

    @property
    def routing_losses(self) -> bool:
        return bool(self.load_balance_coefficient or self.z_loss_coefficient)

    def has_experts(self, layer: int) -> bool:
        """Whether block ``layer`` (from 0) has experts."""
        return self.num_experts > 1 and layer % self.moe_every == self.moe_every - 1

    def parameters(self) -> Iterator[Parameter]:
        """Every parameter once, in the order of ``Decoder.parameters()``."""
        yield from self._parameters

    @cached_property
    def _parameters(self) -> tuple[Parameter, ...]:
        vocabulary = (self.vocab_size, self.dim)
        found = [Parameter("embedding.weight", vocabulary, _TENSOR_0)]
        for layer in range(self.num_layers):
            block = self._block(self.has_experts(layer))
            found += [parameter._replace(name=f"blocks.{layer}.{parameter.name}") for parameter in block]
        found.append(Parameter("norm.weight", (self.dim,), {}, True))
        if not self.tie_embeddings:
            found.append(Parameter("head.weight", vocabulary, _TENSOR_0))
        return tuple(found)

    @cached_property
    def passed(self) -> tuple[int, ...]:
        """Of each parameter, how many parts of a backward are over when its gradient is complete.

        The parts are the head, then of each block from the last on what follows attention, and attention. Of the
        embedding, all.
        """
        found = []
        for parameter in self._parameters:
            if parameter.name.startswith("blocks."):
                _, layer, part = parameter.name.split(".", 2)
                found.append(2 * (self.num_layers - int(layer)) + (0 if part.startswith("mlp") else 1))
            else:
                found.append(2 * self.num_layers + 1 if parameter.name == "embedding.weight" else 1)
        return tuple(found)

    def _block(self, experts: bool) -> Iterator[Parameter]:
        d, h, kv = self.dim, self.hidden, self.kv_heads * self.head_dim
        yield Parameter("attention_norm.weight", (d,), {}, True)
        yield Parameter("attention.query.weight", (d, d), _TENSOR_0)
        yield Parameter("attention.key.weight", (kv, d), _TENSOR_0)
        yield Parameter("attention.value.weight", (kv, d), _TENSOR_0)
        yield Parameter("attention.out.weight", (d, d), _TENSOR_1)
        yield Parameter("mlp_norm.weight", (d,), {}, True)
        ups = ("gate", "up") if self.activation == "swiglu" else ("up",)
        if experts:
            e = self.num_experts
            yield Parameter("mlp.router.weight", (e, d), {}, True)
            for name in ups:
                yield Parameter(f"mlp.experts.{name}", (e, h, d), _UP)
            yield Parameter("mlp.experts.down", (e, d, h), _DOWN)
        else:
            for name in ups:
                yield Parameter(f"mlp.{name}.weight", (h, d), _TENSOR_0)
            yield Parameter("mlp.down.weight", (d, h), _TENSOR_1)

    def counts(self) -> dict[Kind, int]:
        """Parameters of the whole model by kind."""
        total: dict[Kind, int] = {"cut": 0, "uncut": 0, "expert": 0}
        for parameter in self._parameters:
            total[parameter.kind] += parameter.numel
        return total

    def stored(self, layout: Layout) -> tuple[int, ...]:
        """Elements that a rank stores of each parameter, in their order."""
        return _stored(self, layout)

    def stored_counts(self, layout: Layout) -> dict[Kind, int]:
        """Elements that a rank stores, by kind, padding included."""
        total: dict[Kind, int] = {"cut": 0, "uncut": 0, "expert": 0}
        for parameter, elements in zip(self._parameters, self.stored(layout), strict=True):
            total[parameter.kind] += elements
        return total

    def check(self, layout: Layout) -> None:
        """Refuse a layout that some layer of the decoder cannot be sharded for.

        Raises:
            ValueError: naming the size and the axis that does not divide it.
        """
        sizes = {"num_heads": self.num_heads, "num_kv_heads": self.kv_heads}
        if self.dense_layers:
            sizes["hidden_dim"] = self.hidden
        for name, size in sizes.items():
            if size % layout.tensor:
                raise UserValueError(f"{name}={size} is not divisible by tensor_parallel_size={layout.tensor}")
        if self.moe_layers and self.hidden % layout.expert_tensor:
            raise UserValueError(
                f"hidden_dim={self.hidden} is not divisible by expert_tensor_parallel_size={layout.expert_tensor}"
            )


@lru_cache(maxsize=512)
def _stored(sizes: ModelSizes, layout: Layout) -> tuple[int, ...]:
    shapes: dict[tuple[Any, ...], int] = {}  # blocks repeat their parameters' shapes
    for parameter in sizes.parameters():
        key = parameter.shape, tuple(parameter.shard_dims)
        if key not in shapes:
            shapes[key] = parameter.stored(layout)
    return tuple(shapes[p.shape, tuple(p.shard_dims)] for p in sizes.parameters())


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise UserValueError(f"{name}={value} must be at least 1")
