"""Which part of which parameter lives on which rank, and cutting and gathering it.

A layer declares its cut once, as data. Slicing, drawing, gradient reduction, norm counting and saving read it here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tex.parallel import collectives
from lightning_tex.parallel.activation_layout import AlikeStream, Stream
from lightning_tex.parallel.topology import Axis, Layout, Topology

_Reset = TypeVar("_Reset", bound=Callable[..., None])


class TexModule(nn.Module):
    """A layer that can be cut over mesh axes. Built at its full, global size; alone, it is an ordinary module.

    Class attributes that a subclass declares:
        axes: names of the mesh axes it uses; each becomes an attribute holding an :class:`Axis`, of size 1 until cut.
        cuts: parameter name -> {axis name: tensor dim cut over that axis}.
    """

    axes: ClassVar[tuple[str, ...]] = ("tensor",)
    cuts: ClassVar[Mapping[str, Mapping[str, int]]] = {}
    tensor: Axis
    data: Axis
    expert: Axis
    expert_tensor: Axis

    def __init__(self) -> None:
        super().__init__()
        self.bound: Layout | None = None
        self.whole_shapes: dict[str, torch.Size] = {}
        self.stream: Stream = AlikeStream(Axis("tensor"))
        for name in self.axes:
            setattr(self, name, Axis(name))

    def check(self, name: str, layout: Layout) -> None:
        """Raise ``ValueError`` naming the option and the legal values if this layer cannot be cut for ``layout``."""

    def bind(self, topology: Topology) -> None:
        """Take the axes of a topology, and the way its tensor ranks hold the activations between layers."""
        for name in self.axes:
            setattr(self, name, topology.axis(name))
        self.stream = Stream.of(topology)
        self.bound = topology.layout

    def boxes(self) -> dict[str, Box]:
        """The part of each own parameter that this rank holds, in global indices."""
        return {
            name: Box.of(self.whole_shapes.get(name, p.shape), [(getattr(self, a), d) for a, d in cut.items()])
            for name, p in self.named_parameters(recurse=False)
            for cut in [self.cuts.get(name, {})]
        }


@dataclass(frozen=True)
class Box:
    """A rank's rectangular part of a tensor. The stored part may be longer than the box: the rest is padding.

    Args:
        whole: the global shape.
        stored: shape of the rank's tensor, equal on all ranks.
        offsets: global index of the part's first element, per dim.
        sizes: extent of the part that is not padding, per dim.
    """

    whole: tuple[int, ...]
    stored: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, whole: torch.Size | tuple[int, ...], cuts: list[tuple[Axis, int]]) -> Box:
        stored, offsets, sizes = list(whole), [0] * len(whole), list(whole)
        for axis, dim in cuts:
            part = -(-whole[dim] // axis.size)
            start = min(axis.rank * part, whole[dim])
            stored[dim], offsets[dim], sizes[dim] = part, start, min(part, whole[dim] - start)
        return cls(tuple(whole), tuple(stored), tuple(offsets), tuple(sizes))

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor, padded with zeros to the stored shape."""
        part = whole
        for dim, (start, length) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            part = part.narrow(dim, start, length)
        padding = [pad for n, size in zip(self.stored, self.sizes, strict=True) for pad in (n - size, 0)][::-1]
        return F.pad(part, padding).clone(memory_format=torch.contiguous_format)

    def unpadded(self, stored: Tensor) -> Tensor:
        """The part of a stored tensor that is not padding, as a view."""
        return stored[tuple(slice(size) for size in self.sizes)]


@dataclass(frozen=True)
class Placement:
    """Where one parameter lives and how its gradient is combined (DESIGN "Gradient rules").

    Args:
        name: the parameter's name in the model.
        box: this rank's part.
        cuts: the axes it is cut over, each with its tensor dim.
        replicas: the axis whose ranks hold equal copies and reduce gradients: ``data``, or ``expert_data`` for experts.
        divisor: the summed gradient is divided by this, the size of the data axis.
        repeated: whether ranks outside ``replicas`` hold equal copies too.
        parts: the axis whose ranks' gradients are partial sums, each of its own tokens: tensor for an uncut parameter
            under sequence parallelism; size 1 elsewhere.
        counted: whether this rank's copy enters sums over the world; of repeated copies only the first does.
    """

    name: str
    box: Box
    cuts: tuple[tuple[Axis, int], ...]
    replicas: Axis
    divisor: int
    repeated: bool
    counted: bool
    parts: Axis

    @classmethod
    def of(cls, name: str, box: Box, cut: Mapping[str, int], topology: Topology) -> Placement:
        expert = "expert" in cut
        mesh = ("expert", "expert_tensor") if expert else ("tensor",)
        uncut = [topology.axis(axis) for axis in mesh if axis not in cut]
        return cls(
            name,
            box,
            tuple((topology.axis(axis), dim) for axis, dim in cut.items()),
            topology.expert_data if expert else topology.data,
            topology.data.size,
            any(axis.size > 1 for axis in uncut),
            all(axis.rank == 0 for axis in uncut),
            Axis("tensor") if cut else Stream.of(topology).parts,
        )

    def gather(self, stored: Tensor) -> Tensor:
        """The whole tensor from every rank's stored part. Collective over the cut axes."""
        for axis, dim in self.cuts:
            whole = self.box.whole[dim]
            stored = collectives.all_gather(stored, dim, axis).narrow(dim, 0, whole)
        return stored


def tex_modules(root: nn.Module) -> Iterator[tuple[str, TexModule]]:
    """Every TEX layer of a model with its name."""
    for name, module in root.named_modules():
        if isinstance(module, TexModule):
            yield name, module


def placements(root: nn.Module, topology: Topology) -> dict[str, Placement]:
    """The placement of every parameter of a cut model; a tied parameter once, under its first name."""
    found: dict[str, Placement] = {}
    seen: set[int] = set()
    for prefix, module in root.named_modules():
        boxes = module.boxes() if isinstance(module, TexModule) else {}
        cuts = module.cuts if isinstance(module, TexModule) else {}
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                name = f"{prefix}.{own}" if prefix else own
                box = boxes.get(own) or Box.of(parameter.shape, [])
                found[name] = Placement.of(name, box, cuts.get(own, {}), topology)
    return found


def check(root: nn.Module, layout: Layout) -> None:
    """Raise, before anything is cut, if some layer cannot be cut for the layout or is cut for another."""
    for name, module in tex_modules(root):
        if module.bound not in (None, layout):
            raise ValueError(
                f"{name or type(module).__name__} is already cut for another layout ({module.bound}); asked for: "
                f"{layout}. Build the model anew, or load a checkpoint into a new one"
            )
        module.check(name or type(module).__name__, layout)
    _check_ties(root, layout)


def _check_ties(root: nn.Module, layout: Layout) -> None:
    owners: dict[int, tuple[str, dict[str, int]]] = {}
    for prefix, module in root.named_modules():
        cuts = module.cuts if isinstance(module, TexModule) else {}
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{own}" if prefix else own
            cut = {axis: dim for axis, dim in cuts.get(own, {}).items() if getattr(layout, axis) > 1}
            other, others_cut = owners.setdefault(id(parameter), (name, cut))
            if cut != others_cut:
                raise ValueError(
                    f"{name} and {other} are one parameter, but {cut or 'whole'} in the one and "
                    f"{others_cut or 'whole'} in the other (axis: dim); legal: layers with the same "
                    "cut, such as VocabParallelEmbedding and VocabParallelHead"
                )


def synchronise(root: nn.Module, world: Axis, device: torch.device) -> None:
    """Give every rank rank 0's weights and buffers, for what is not on the meta device and not cut already.

    Tensors travel one by one by way of ``device`` and stay where they are: a whole model need not fit there.
    """
    cut = {id(p) for _, m in tex_modules(root) if m.bound for p in m.parameters(recurse=False)}
    tensors = [*root.parameters(), *root.buffers()]
    for tensor in tensors:
        if not tensor.is_meta and id(tensor) not in cut:
            # As bytes: not every backend knows every dtype a buffer may have.
            there = tensor.data.to(device).contiguous()
            sent = collectives.broadcast(there.reshape(-1).view(torch.uint8), world)
            tensor.data.copy_(sent.view(tensor.dtype).view(tensor.shape))


@torch.no_grad()
def cut(root: nn.Module, topology: Topology) -> None:
    """Replace every TEX layer's parameters by this rank's part, in place. Idempotent. Meta parameters stay meta."""
    whole_shapes: dict[int, torch.Size] = {}
    for _, module in tex_modules(root):
        already = module.bound is not None
        module.bind(topology)
        if already:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            tied = id(parameter) in whole_shapes
            module.whole_shapes[name] = whole_shapes.setdefault(id(parameter), parameter.shape)
            if not tied and module.cuts.get(name):
                parameter.grad = None
                parameter.data = module.boxes()[name].cut(parameter.data)
