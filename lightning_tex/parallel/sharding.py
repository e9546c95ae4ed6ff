"""Which part of which parameter lives on which rank, and sharding and gathering it.

A layer declares once, as data, how it is sharded; slicing, initialization, gradients, norms and saving read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_tex.parallel import collectives
from lightning_tex.parallel.activation_layout import ActivationLayout, Replicated
from lightning_tex.parallel.box import Box
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.topology import Axis, Topology

# Tensors of fewer bytes are sent together, so many at most.
_SMALL_BYTES, _TOGETHER = 1 << 16, 256


class TexModule(nn.Module):
    """A layer that can be sharded over mesh axes. Built at its full, global size; alone, it is an ordinary module.

    Class attributes that a subclass declares:
        axes: names of the mesh axes it uses; each becomes an attribute, an :class:`Axis` of size 1 until sharded.
        shard_dims: parameter name -> {axis name: tensor dim sharded over that axis}.
        full_precision: mixed precision leaves its own parameters in fp32.
        hidden: its own parameters of two dims are matrices between embedding and head, as an optimizer for hidden
            matrices (Muon) steps them.
        partial_gradients: names of parameters, or of modules inside, that act between the borders of a region which is
            sharded over tensor and are whole there, such as a norm over a rank's heads: a rank's gradient of them is
            the part of it that comes from what the rank computes, and is summed over tensor. A plain module may declare
            them, too.
    """

    axes: ClassVar[tuple[str, ...]] = ("tensor",)
    shard_dims: ClassVar[Mapping[str, Mapping[str, int]]] = {}
    partial_gradients: ClassVar[tuple[str, ...]] = ()
    full_precision: ClassVar[bool] = False
    hidden: ClassVar[bool] = True
    tensor: Axis
    data: Axis
    expert: Axis
    expert_tensor: Axis

    def __init__(self) -> None:
        super().__init__()
        self.bound: Layout | None = None
        self.full_shapes: dict[str, torch.Size] = {}
        self.activation_layout: ActivationLayout = Replicated(Axis("tensor"))
        for name in self.axes:
            setattr(self, name, Axis(name))

    def check(self, name: str, layout: Layout) -> None:
        """Raise ``ValueError`` naming the option and legal values if this layer cannot be sharded for ``layout``."""

    def bind(self, topology: Topology) -> None:
        """Take the axes of a topology, and the way its tensor ranks hold the activations between layers."""
        for name in self.axes:
            setattr(self, name, topology.axis(name))
        self.activation_layout = ActivationLayout.of(topology)
        self.bound = topology.layout

    def boxes(self) -> dict[str, Box]:
        """The part of each own parameter that this rank holds, in global indices."""
        return {
            name: Box.of(self.full_shapes.get(name, p.shape), [(getattr(self, a), d) for a, d in dims.items()])
            for name, p in self.named_parameters(recurse=False)
            for dims in [self.shard_dims.get(name, {})]
        }


@dataclass(frozen=True)
class ParameterSharding:
    """Where one parameter lives and how its gradient is combined (docs/design.md, "Gradient rules").

    Args:
        name: the parameter's name in the model.
        box: this rank's part.
        shard_dims: the axes it is sharded over, each with its tensor dim.
        replicas: the axis whose ranks hold equal copies and reduce gradients: ``data``, or ``expert_data`` for experts.
        divisor: the summed gradient is divided by this, the size of the data axis.
        copies: the axes besides ``replicas`` whose ranks hold equal copies, too.
        partial_axis: the axis whose ranks' gradients are partial sums: tensor for a replicated parameter under sequence
            parallelism, where they are of a rank's tokens, and for one that is declared so; size 1 elsewhere.
        declared_partial: whether a module declares it so (:class:`TexModule`), whatever the loss reaches it through.
    """

    name: str
    box: Box
    shard_dims: tuple[tuple[Axis, int], ...]
    replicas: Axis
    divisor: int
    copies: tuple[Axis, ...]
    partial_axis: Axis
    declared_partial: bool = False

    @classmethod
    def of(
        cls, name: str, box: Box, shard_dims: Mapping[str, int], topology: Topology, partial: bool = False
    ) -> ParameterSharding:
        expert = "expert" in shard_dims
        mesh = ("expert", "expert_tensor") if expert else ("tensor",)
        whole = topology.tensor if partial else ActivationLayout.of(topology).shard_axis
        return cls(
            name,
            box,
            tuple((topology.axis(axis), dim) for axis, dim in shard_dims.items()),
            topology.expert_data if expert else topology.data,
            topology.data.size,
            tuple(topology.axis(axis) for axis in mesh if axis not in shard_dims),
            Axis("tensor") if shard_dims else whole,
            partial,
        )

    @property
    def repeated(self) -> bool:
        """Whether ranks outside ``replicas`` hold equal copies too."""
        return any(axis.size > 1 for axis in self.copies)

    @property
    def counted(self) -> bool:
        """Whether this rank's copy enters sums over the world; of repeated copies only the first does."""
        return all(axis.rank == 0 for axis in self.copies)

    def gather(self, stored: Tensor) -> Tensor:
        """The whole tensor from every rank's stored part. Collective over the sharded axes."""
        for axis, dim in self.shard_dims:
            whole = self.box.full[dim]
            stored = collectives.all_gather(stored, dim, axis).narrow(dim, 0, whole)
        return stored


def tex_modules(root: nn.Module) -> Iterator[tuple[str, TexModule]]:
    """Every TEX layer of a model with its name."""
    for name, module in root.named_modules():
        if isinstance(module, TexModule):
            yield name, module


def parameter_shardings(root: nn.Module, topology: Topology) -> dict[str, ParameterSharding]:
    """The sharding of every parameter of a sharded model; a tied parameter once, under its first name."""
    found: dict[str, ParameterSharding] = {}
    seen: set[int] = set()
    partial = declared_partial(root)
    for prefix, module in root.named_modules():
        boxes = module.boxes() if isinstance(module, TexModule) else {}
        shard_dims = module.shard_dims if isinstance(module, TexModule) else {}
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                name = f"{prefix}.{own}" if prefix else own
                box = boxes.get(own) or Box.of(parameter.shape, [])
                found[name] = ParameterSharding.of(
                    name, box, shard_dims.get(own, {}), topology, partial=id(parameter) in partial
                )
    return found


def declared_partial(root: nn.Module) -> set[int]:
    """Parameters, by identity, that some module's ``partial_gradients`` names.

    Raises:
        ValueError: a name of nothing, or of a parameter that is sharded, whose gradient is whole on its rank.
    """
    sharded = {
        id(getattr(module, own)) for _, module in tex_modules(root) for own in module.shard_dims if hasattr(module, own)
    }
    partial: set[int] = set()
    for prefix, module in root.named_modules():
        names: tuple[str, ...] = getattr(module, "partial_gradients", ())
        for name in names:
            under = {
                own: parameter
                for own, parameter in module.named_parameters()
                if own == name or own.startswith(f"{name}.")
            }
            where = f"{prefix or type(root).__name__}: partial_gradients names {name!r}"
            if not under:
                legal = ", ".join(own for own, p in module.named_parameters() if id(p) not in sharded) or "nothing"
                raise UserValueError(f"{where}, which is no parameter and no module with parameters; legal: {legal}")
            if wrong := [own for own, parameter in under.items() if id(parameter) in sharded]:
                raise UserValueError(
                    f"{where}, but {', '.join(wrong)} is sharded, and a rank's gradient of its own part is whole; "
                    "legal: parameters that tensor ranks hold alike"
                )
            partial |= set(map(id, under.values()))
    return partial


def check_shardable(root: nn.Module, layout: Layout) -> None:
    """Raise, before anything is sharded, if some layer cannot be sharded for the layout or is sharded for another."""
    for name, module in tex_modules(root):
        if module.bound not in (None, layout):
            raise UserValueError(
                f"{name or type(module).__name__} is already sharded for another layout ({module.bound}); asked for: "
                f"{layout}. Build the model anew, or load a checkpoint into a new one"
            )
    check_sizes(root, layout)


def check_sizes(root: nn.Module, layout: Layout) -> None:
    """Raise if the full sizes of some layer, or what is tied, cannot be sharded for the layout."""
    for name, module in tex_modules(root):
        module.check(name or type(module).__name__, layout)
    _check_ties(root, layout)
    declared_partial(root)


def _check_ties(root: nn.Module, layout: Layout) -> None:
    owners: dict[int, tuple[str, dict[str, int]]] = {}
    for prefix, module in root.named_modules():
        shard_dims = module.shard_dims if isinstance(module, TexModule) else {}
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{own}" if prefix else own
            dims = {axis: dim for axis, dim in shard_dims.get(own, {}).items() if getattr(layout, axis) > 1}
            other, others_dims = owners.setdefault(id(parameter), (name, dims))
            if dims != others_dims:
                raise UserValueError(
                    f"{name} and {other} are one parameter, but {dims or 'whole'} in the one and "
                    f"{others_dims or 'whole'} in the other (axis: dim); legal: layers with the same "
                    "sharding, such as VocabParallelEmbedding and VocabParallelHead"
                )


def synchronise(root: nn.Module, world: Axis, device: torch.device) -> None:
    """Give every rank rank 0's weights and buffers, for what is not on the meta device and not sharded already.

    Tensors travel by way of ``device``, small ones together and others one by one, and stay where they are: a whole
    model need not fit there.
    """
    sharded = {id(p) for _, m in tex_modules(root) if m.bound for p in m.parameters(recurse=False)}
    tensors = [t for t in (*root.parameters(), *root.buffers()) if not t.is_meta and id(t) not in sharded]
    for some in _sent_together(tensors):
        # As bytes: not every backend knows every dtype a buffer may have.
        there = [tensor.data.to(device).reshape(-1).view(torch.uint8) for tensor in some]
        sent = collectives.broadcast(torch.cat(there) if len(there) > 1 else there[0], world)
        for tensor, part in zip(some, sent.split([len(own) for own in there]), strict=True):
            tensor.data.copy_(part.view(tensor.dtype).view(tensor.shape))


def _sent_together(tensors: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Small tensors of one dtype, whose bytes one after another are still aligned; the others alone."""
    small: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.nbytes < _SMALL_BYTES:
            small.setdefault(tensor.dtype, []).append(tensor)
        else:
            yield [tensor]
    for alike in small.values():
        for start in range(0, len(alike), _TOGETHER):
            yield alike[start : start + _TOGETHER]


@torch.no_grad()
def shard_module(root: nn.Module, topology: Topology) -> None:
    """Replace every TEX layer's parameters by this rank's part, in place. Idempotent. Meta parameters stay meta."""
    full_shapes: dict[int, torch.Size] = {}
    for _, module in tex_modules(root):
        already = module.bound is not None
        module.bind(topology)
        if already:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            tied = id(parameter) in full_shapes
            module.full_shapes[name] = full_shapes.setdefault(id(parameter), parameter.shape)
            if not tied and module.shard_dims.get(name):
                parameter.grad = None
                parameter.data = module.boxes()[name].shard(parameter.data)
