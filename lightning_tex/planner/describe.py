"""A module read into the planner's description of it, and decoders by their configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import lru_cache

import torch
from torch import nn

from lightning_tex.layers.adapters import Adapter
from lightning_tex.models.block import Block
from lightning_tex.models.config import DecoderConfig
from lightning_tex.models.decoder import Decoder
from lightning_tex.parallel.activation_checkpointing import checkpointed_blocks
from lightning_tex.parallel.precision import keeps_full_precision
from lightning_tex.parallel.sharding import TexModule, check_sizes, declared_partial
from lightning_tex.planner.layers import (
    Attention,
    Embedding,
    Head,
    Layer,
    LinearCrossEntropy,
    Loss,
    Mlp,
    Moe,
    Norm,
    Other,
    known_layer,
)
from lightning_tex.planner.model import ModelDescription, Parameter, PlacedLayer, Repeated


def describe(
    root: nn.Module, policy: set[type[nn.Module]] | None = None, input_gradient: bool = False
) -> ModelDescription:
    """Describe a module by its full sizes, whether it is sharded or not.

    Args:
        root: the module; on any device, meta included.
        policy: classes of the blocks that are recomputed, as the strategy's ``activation_checkpointing_policy``.
        input_gradient: whether the module's input has a gradient, as that of a part of a model.
    """
    blocks = dict(checkpointed_blocks(root, policy))
    walk = _Walk(blocks, declared_partial(root))
    walk.visit(root, "", None, None)
    layers = tuple(walk.placed(input_gradient))
    return ModelDescription(
        tuple(walk.parameters),
        layers,
        _formulas_hold(root, list(blocks.values()), layers),
        walk.tied,
        lambda layout: check_sizes(root, layout),
    )


def describe_decoder(config: DecoderConfig) -> ModelDescription:
    """Describe a :class:`Decoder` and the loss that :class:`LanguageModel` takes of it.

    By a decoder of one block of each kind on the meta device.

    Raises:
        ValueError: sizes that no decoder has.
    """
    return _describe_decoder(_Sizes(config))


def decoder_parameters(config: DecoderConfig) -> int:
    """Parameters of a whole :class:`Decoder`."""
    shallow, order = _shallow(config)
    times = Counter(order)
    return sum(
        parameter.numel * (1 if (block := shallow.layers[parameter.layer].block) is None else times[block])
        for parameter in shallow.parameters
    )


class _Sizes:
    """A configuration as the key of a cache: compared by its values, some of which are lists."""

    def __init__(self, config: DecoderConfig) -> None:
        self.config, self._values = replace(config), repr(config)

    def __hash__(self) -> int:
        return hash(self._values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Sizes) and self._values == other._values


@lru_cache(maxsize=512)
def _describe_decoder(sizes: _Sizes) -> ModelDescription:
    deep = _repeated(*_shallow(sizes.config))
    return replace(deep, layers=(*deep.layers, PlacedLayer(LinearCrossEntropy())), config=sizes.config)


def _shallow(config: DecoderConfig) -> tuple[ModelDescription, tuple[int, ...]]:
    """A decoder of one block of each kind, and of each block of the whole one the kind."""
    kinds = Repeated.of(config.block_kinds())
    with torch.device("meta"):
        shallow = describe(Decoder(config.of_blocks([kinds.order.index(kind) for kind in range(len(kinds.kinds))])))
    return shallow, kinds.order


def _repeated(shallow: ModelDescription, order: Sequence[int]) -> ModelDescription:
    """A decoder's description with these of its blocks, in this order."""
    of_layer: list[list[Parameter]] = [[] for _ in shallow.layers]
    for parameter in shallow.parameters:
        of_layer[parameter.layer].append(parameter)
    layers: list[PlacedLayer] = []
    parameters: list[Parameter] = []

    def copy(places: Iterable[int], block: int | None = None) -> None:
        for place in places:
            layer, shown, ends_block, input_gradient, frozen = shallow.layers[place]
            first = 0 if block is None else len(f"blocks.{shown}.")
            prefix = "" if block is None else f"blocks.{block}."
            for name, shape, shard_dims, full_precision, requires_grad, _, declared in of_layer[place]:
                renamed, here = prefix + name[first:], len(layers)
                parameters.append(Parameter(renamed, shape, shard_dims, full_precision, requires_grad, here, declared))
            layers.append(PlacedLayer(layer, block, ends_block, input_gradient, frozen))

    of_block: dict[int | None, list[int]] = {}
    for place, placed in enumerate(shallow.layers):
        of_block.setdefault(placed.block, []).append(place)
    first, last = min(of_block[0]), max(of_block[len(of_block) - 2])
    copy(range(first))
    for block, shown in enumerate(order):
        copy(of_block[shown], block)
    copy(range(last + 1, len(shallow.layers)))
    return replace(shallow, parameters=tuple(parameters), layers=tuple(layers), laid_out={})


def _formulas_hold(root: nn.Module, blocks: list[nn.Module], layers: tuple[PlacedLayer, ...]) -> bool:
    """Whether a module trains one decoder as it stands, and nothing else."""
    decoders = [module for module in root.modules() if isinstance(module, Decoder)]
    if len(decoders) != 1 or not all(parameter.requires_grad for parameter in root.parameters()):
        return False
    losses = [placed.layer for placed in layers if isinstance(placed.layer, Loss)]
    outside = [type(placed.layer) for placed in layers if not placed.in_block and placed.layer not in losses]
    inside = [type(placed.layer) for placed in layers if placed.in_block]
    patterns = [inside[start : start + len(_BLOCK)] for start in range(0, len(inside), len(_BLOCK))]
    return (
        type(decoders[0]).forward is Decoder.forward
        and _plain_arithmetic(decoders[0].config)
        and all(type(block) is Block for block in blocks)
        and blocks == list(decoders[0].blocks)
        and outside == [Embedding, Norm, Head]
        and len(set(losses)) <= 1
        and all(pattern[:-1] == _BLOCK[:-1] and pattern[-1] in (Mlp, Moe) for pattern in patterns)
        and all(placed.layer.plain for placed in layers if isinstance(placed.layer, (Norm, Attention, Mlp, Moe, Head)))
    )


def _plain_arithmetic(config: DecoderConfig) -> bool:
    """Whether a decoder multiplies what is between its layers by nothing."""
    return config.embedding_multiplier == config.residual_multiplier == config.logits_scaling == 1


# The layers of a Block; the last may have experts.
_BLOCK = [Norm, Attention, Norm, Mlp]


class _Walk:
    """Collects parameters and layers in the order of ``named_modules``."""

    def __init__(self, blocks: Mapping[str, nn.Module], partial: Set[int]) -> None:
        self.parameters: list[Parameter] = []
        self._partial = partial
        self.tied = False
        self._layers: list[tuple[Layer, int | None]] = []
        self._losses: list[Layer] = []
        self._blocks = {name: number for number, name in enumerate(blocks)}
        self._modules: set[int] = set()
        self._tensors: dict[int, int] = {}  # the layer that a parameter was seen in first
        self._with_gradients: set[int] = set()  # layers with something trained that is no adapter beside a product

    def visit(self, module: nn.Module, name: str, layer: int | None, block: int | None) -> None:
        """Go through a module; ``layer`` and ``block`` are those around it, if there are any."""
        if id(module) in self._modules:
            return
        self._modules.add(id(module))
        block = self._blocks.get(name) if block is None else block
        around = layer
        if layer is None and (known := known_layer(module)) is not None:
            if isinstance(known, Loss):
                self._losses.append(known)
            else:
                layer = len(self._layers)
                self._layers.append((known, block))
                # What is only known to have parameters may hold layers that are known better.
                around = None if isinstance(known, Other) else layer
        prefix = f"{name}." if name else ""
        for own, parameter in module.named_parameters(recurse=False):
            assert layer is not None
            self._add(module, prefix + own, own, parameter, layer)
        for own, child in module.named_children():
            self.visit(child, prefix + own, around, block)

    def _add(self, module: nn.Module, name: str, own: str, parameter: nn.Parameter, layer: int) -> None:
        if parameter.requires_grad and not isinstance(module, Adapter):
            self._with_gradients.add(layer)
        if id(parameter) in self._tensors:
            ends = self._layers[self._tensors[id(parameter)]][0], self._layers[layer][0]
            self.tied |= isinstance(ends[0], Embedding) and isinstance(ends[1], Head)
            return
        self._tensors[id(parameter)] = layer
        shard_dims = module.shard_dims.get(own, {}) if isinstance(module, TexModule) else {}
        shapes = module.full_shapes if isinstance(module, TexModule) else {}
        self.parameters.append(
            Parameter(
                name,
                tuple(shapes.get(own, parameter.shape)),
                tuple(shard_dims.items()),
                keeps_full_precision(module),
                parameter.requires_grad,
                layer,
                id(parameter) in self._partial,
            )
        )

    def placed(self, input_gradient: bool) -> Iterator[PlacedLayer]:
        """The layers in their order."""
        trained = {parameter.layer for parameter in self.parameters if parameter.requires_grad}
        following = [block for _, block in self._layers[1:]] + [None]
        for place, ((layer, block), after) in enumerate(zip(self._layers, following, strict=True)):
            frozen = place not in self._with_gradients
            yield PlacedLayer(layer, block, block is not None and after != block, input_gradient, frozen)
            # Where a module uses parameters of its own beside the layers in it, nobody knows.
            input_gradient |= place in trained and not isinstance(layer, Other)
        yield from map(PlacedLayer, self._losses)
