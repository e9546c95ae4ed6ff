"""A model as the planner knows it, read from its modules: parameters with their shardings, layers in their order.

Nothing here repeats what a layer declares. A module is described as it stands, on the meta device or not; a
:class:`Decoder` is built there from its configuration, with as few blocks as show all kinds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from lightning_tex.models.config import DecoderConfig
from lightning_tex.parallel.box import Box
from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.sharding import ParameterSharding
from lightning_tex.parallel.topology import Topology
from lightning_tex.planner.layers import Embedding, Head, Layer, Loss, Moe, Norm

Kind = Literal["sharded", "replicated", "expert"]
# Layers that a backward passes together, each with whether it is in a block.
BackwardPart = tuple[tuple[Layer, bool], ...]
_Member = TypeVar("_Member")


class Parameter(NamedTuple):
    """One parameter of a model.

    Args:
        name: in the model; a tied one has its first.
        shape: the whole one.
        shard_dims: (axis name, tensor dim), as the layer declares them.
        full_precision: a norm's or router's, which mixed precision keeps in fp32.
        requires_grad: whether it is trained.
        layer: the place of its layer among the model's.
        declared_partial: whether its gradient is declared to be a partial sum over tensor.
    """

    name: str
    shape: tuple[int, ...]
    shard_dims: tuple[tuple[str, int], ...]
    full_precision: bool
    requires_grad: bool
    layer: int
    declared_partial: bool = False

    @property
    def kind(self) -> Kind:
        """How the ranks share it: sharded over tensor, on all tensor ranks alike, or spread over expert."""
        return "expert" if "expert" in dict(self.shard_dims) else "sharded" if self.shard_dims else "replicated"

    @property
    def numel(self) -> int:
        """Elements of the whole."""
        return prod(self.shape)

    def sharding(self, topology: Topology) -> ParameterSharding:
        """Where a rank of a topology has it."""
        box = Box.of(self.shape, [(topology.axis(axis), dim) for axis, dim in self.shard_dims])
        return ParameterSharding.of(self.name, box, dict(self.shard_dims), topology, self.declared_partial)


@dataclass(frozen=True)
class Repeated(Generic[_Member]):
    """A sequence in which things repeat.

    Args:
        kinds: the different ones, in the order in which they come first.
        order: of each member of the sequence, the place of its kind.
    """

    kinds: tuple[_Member, ...]
    order: tuple[int, ...]

    @classmethod
    def of(cls, members: Iterable[_Member]) -> Repeated[_Member]:
        places: dict[_Member, int] = {}
        order = tuple(places.setdefault(member, len(places)) for member in members)
        return cls(tuple(places), order)


class PlacedLayer(NamedTuple):
    """A layer in a model.

    Args:
        layer: its sizes.
        block: the number of the block whose activations are recomputed together; ``None`` outside of all.
        ends_block: whether it is the block's last, where a recomputation stops.
        input_gradient: whether its input has a gradient: something that is trained comes before it.
        frozen: its matrices have no gradients, whether low-rank adapters act beside them or not.
    """

    layer: Layer
    block: int | None = None
    ends_block: bool = False
    input_gradient: bool = True
    frozen: bool = False

    @property
    def in_block(self) -> bool:
        return self.block is not None


@dataclass(frozen=True, eq=False)
class ModelDescription:
    """What the planner reads of a model. Compared by identity: caches hold what is worked out for it.

    Args:
        parameters: each once, in the order of ``module.parameters()``.
        layers: in the order of their definition, which is taken for that of a forward; losses last.
        declared: whether the formulas that layers declare for activations hold for it.
        tied: embedding and head share one matrix.
        config: the sizes of a decoder, if it is one: what a search can vary.
        check: refuses a layout that some layer cannot be sharded for.
        laid_out: the flat buffers by layout and options, as far as they have been laid out (``states.FlatBuffers``).
    """

    parameters: tuple[Parameter, ...]
    layers: tuple[PlacedLayer, ...]
    declared: bool
    tied: bool
    check: Callable[[Layout], None]
    config: DecoderConfig | None = None
    laid_out: dict[tuple[object, ...], Any] = field(default_factory=dict)

    @cached_property
    def experts(self) -> tuple[int, ...]:
        """Number of experts of each MoE layer, as ``Layout.resolve`` takes it."""
        return tuple(placed.layer.num_experts for placed in self.layers if isinstance(placed.layer, Moe))

    @cached_property
    def sequence_can_be_split(self) -> bool:
        """Whether there are both ends of what sequence parallelism splits."""
        return {Embedding, Head} <= {type(placed.layer) for placed in self.layers}

    @cached_property
    def layer_counts(self) -> Mapping[PlacedLayer, int]:
        """How often each layer occurs, of all blocks as if they were the first."""
        return Counter(placed._replace(block=0) if placed.in_block else placed for placed in self.layers)

    @cached_property
    def blocks(self) -> Repeated[tuple[Layer, ...]]:
        """The layers of each block."""
        blocks: dict[int, list[Layer]] = {}
        for placed in self.layers:
            if placed.block is not None:
                blocks.setdefault(placed.block, []).append(placed.layer)
        return Repeated.of(map(tuple, blocks.values()))

    @cached_property
    def outside_blocks(self) -> tuple[Layer, ...]:
        """The layers that no recomputation repeats."""
        return tuple(placed.layer for placed in self.layers if placed.block is None)

    @cached_property
    def backward_parts(self) -> Repeated[BackwardPart]:
        """The layers grouped as a backward passes them, in the order of the forward: each with the norms before it."""
        return Repeated.of(self._parts)

    @cached_property
    def _parts(self) -> tuple[BackwardPart, ...]:
        parts: list[BackwardPart] = []
        norms: BackwardPart = ()
        for placed in self.layers:
            one = ((placed.layer, placed.in_block),)
            if isinstance(placed.layer, Norm):
                norms += one
            elif isinstance(placed.layer, Loss) and parts:
                parts[-1] += one
            else:
                parts.append(norms + one)
                norms = ()
        return (*parts, norms) if norms else tuple(parts)

    @cached_property
    def part_of_layer(self) -> tuple[int, ...]:
        """Of each layer, the place of its part in :attr:`backward_parts`."""
        return tuple(part for part, layers in enumerate(self._parts) for _ in layers)

    @cached_property
    def first_after_block(self) -> tuple[int, ...]:
        """Of each block, the place of the first parameter that comes after it."""
        blocks = [self.layers[parameter.layer].block for parameter in self.parameters]
        last = {block: place for place, block in enumerate(blocks) if block is not None}
        return tuple(last[block] + 1 for block in sorted(last))

    def counts(self) -> dict[Kind, int]:
        """Parameters of the whole model by kind."""
        total: dict[Kind, int] = {"sharded": 0, "replicated": 0, "expert": 0}
        for parameter in self.parameters:
            total[parameter.kind] += parameter.numel
        return total

    def shardings(self, layout: Layout) -> tuple[ParameterSharding, ...]:
        """Where the first rank of a layout has each parameter."""
        topology = Topology.without_groups(layout)
        alike: dict[tuple[object, ...], ParameterSharding] = {}  # blocks repeat their parameters' shapes
        for parameter in self.parameters:
            key = parameter.shape, parameter.shard_dims
            if key not in alike:
                alike[key] = parameter.sharding(topology)
        return tuple(alike[parameter.shape, parameter.shard_dims] for parameter in self.parameters)
