"""Rules that tie tensors in files to parameters: written once, used for reading, for writing and for checking.

A rule says which parameters, or which experts of stacked ones, a tensor in files is put together of. Resolved against
the parameters' shapes it is the shape that the tensor must have, and pieces: rectangles of it that are rectangles of a
parameter, the same elements both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lightning_tex.parallel.extent import Extent

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One tensor in files, and what it is of a model.

    Args:
        stored: its name in files.
        parameters: what it is put together of, in order; several lie one behind the other along ``dim``.
        expert: of parameters that stack experts in their first dim, the one that is meant; ``None``: all of each.
        dim: of the tensor in files before ``transposed``, negative: from the last.
        interleaved: they take turns along ``dim``, one index each.
        blocks: they lie one behind the other in each of so many equal blocks along ``dim``, such as for each head.
        transposed: the last two dims are the other way round in files.
        dtype: in which it is always written; ``None``: as all others.
        copy: it repeats what another tensor holds. It may be absent, must be equal where it is there, and is not
            written.
    """

    stored: str
    parameters: tuple[str, ...]
    expert: int | None = None
    dim: int = 0
    interleaved: bool = False
    blocks: int = 1
    transposed: bool = False
    dtype: torch.dtype | None = None
    copy: bool = False

    def resolve(self, shapes: Shapes) -> tuple[tuple[int, ...], list[Piece]]:
        """The shape in files, and the pieces.

        Args:
            shapes: of whole parameters, by name.
        """
        views = [shapes[name] if self.expert is None else shapes[name][1:] for name in self.parameters]
        dim = self.dim % len(views[0])
        lengths = [view[dim] for view in views]
        joined = (*views[0][:dim], sum(lengths), *views[0][dim + 1 :])
        assert all(length % self.blocks == 0 for length in lengths), (self, shapes)
        pieces = []
        for number, (name, view) in enumerate(zip(self.parameters, views, strict=True)):
            for block in range(self.blocks):
                begin, step = self._place(number, block, lengths)
                length = lengths[number] // self.blocks
                sizes = (*view[:dim], length, *view[dim + 1 :])
                target = Extent(tuple(block * length if d == dim else 0 for d in range(len(view))), sizes)
                if self.expert is not None:
                    target = Extent((self.expert, *target.offsets), (1, *sizes))
                offsets = tuple(begin if d == dim else 0 for d in range(len(view)))
                steps = tuple(step if d == dim else 1 for d in range(len(view)))
                pieces.append(Piece(self.stored, name, target, offsets, steps, self.transposed))
        return (_swapped(joined) if self.transposed else joined), pieces

    def _place(self, number: int, block: int, lengths: list[int]) -> tuple[int, int]:
        """First index of a parameter's block along ``dim``, and the step to the next index."""
        if self.interleaved:
            return number, len(lengths)
        before = sum(lengths[:number])
        return (block * sum(lengths) + before) // self.blocks, 1


@dataclass(frozen=True, slots=True)
class Either:
    """Several layouts of the same parameters in files; that which is there is read, and the first is written."""

    forms: tuple[tuple[Rule, ...], ...]

    def chosen(self, names: Collection[str] | None) -> tuple[Rule, ...]:
        """The first of which some tensor is among these; without names, or where there is none, the first of all."""
        there = names if names is not None else ()
        return next((form for form in self.forms if any(rule.stored in there for rule in form)), self.forms[0])


def chosen(rules: Iterable[Rule | Either], names: Collection[str] | None = None) -> Iterator[Rule]:
    """The rules that hold for these names in files, or ``None``: those that are written."""
    for rule in rules:
        if isinstance(rule, Either):
            yield from rule.chosen(names)
        elif not rule.copy or (names is not None and rule.stored in names):
            yield rule


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements of a tensor in files that are elements of a parameter, in the same order of dims but for leading ones.

    Args:
        stored: the tensor's name in files.
        parameter: the parameter's name.
        target: which elements of the parameter.
        offsets: the first of them in the tensor, per dim, before it is transposed.
        steps: from one to the next there, per dim.
        transposed: the tensor's last two dims are the other way round in files.
    """

    stored: str
    parameter: str
    target: Extent
    offsets: tuple[int, ...]
    steps: tuple[int, ...]
    transposed: bool

    def source(self, wanted: Extent) -> Extent:
        """The rectangle in files that some elements within ``target`` lie in, with what is between them."""
        inside = wanted.within(self.target)
        leading = len(inside.sizes) - len(self.offsets)
        offsets, sizes = inside.offsets[leading:], inside.sizes[leading:]
        first = tuple(o + i * s for o, i, s in zip(self.offsets, offsets, self.steps, strict=True))
        spans = tuple((size - 1) * step + 1 for size, step in zip(sizes, self.steps, strict=True))
        return Extent(*map(_swapped, (first, spans))) if self.transposed else Extent(first, spans)

    def taken(self, rectangle: Tensor, wanted: Extent) -> Tensor:
        """Of a rectangle in files its elements in the parameter's shape; a view, to copy from or into."""
        tensor = rectangle.mT if self.transposed else rectangle
        return tensor[tuple(slice(None, None, step) for step in self.steps)].view(wanted.sizes)

    @property
    def dense(self) -> bool:
        """Whether nothing of others lies between its elements in files."""
        return all(step == 1 for step in self.steps)


@dataclass(frozen=True)
class Bindings:
    """Rules resolved against a model's parameters.

    Args:
        stored: by name in files, the shape there.
        dtypes: by name in files, where a rule says one.
        pieces: by parameter, what it is filled from.
        copies: likewise, what must be equal to it.
    """

    stored: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    pieces: dict[str, list[Piece]]
    copies: dict[str, list[Piece]]

    @classmethod
    def of(cls, rules: Iterable[Rule], shapes: Shapes) -> Bindings:
        """Resolve; every parameter must be filled exactly once, and every name in files be used once.

        Raises:
            AssertionError: a family's rules do not fit the model that its configuration gives.
        """
        stored: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, torch.dtype] = {}
        pieces: dict[str, list[Piece]] = {}
        copies: dict[str, list[Piece]] = {}
        for rule in rules:
            assert rule.stored not in stored, f"two rules for {rule.stored}"
            stored[rule.stored], parts = rule.resolve(shapes)
            if rule.dtype is not None:
                dtypes[rule.stored] = rule.dtype
            for piece in parts:
                (copies if rule.copy else pieces).setdefault(piece.parameter, []).append(piece)
        _require_filled(pieces, shapes)
        return cls(stored, dtypes, pieces, copies)


def _require_filled(pieces: Mapping[str, list[Piece]], shapes: Shapes) -> None:
    for name, shape in shapes.items():
        parts = {piece.target for piece in pieces.get(name, ())}
        count = sum(part.numel for part in parts)
        assert len(parts) == len(pieces.get(name, ())) and count == prod(shape), (
            f"{name} of shape {shape} is filled by {count} elements of {sorted(p.stored for p in pieces.get(name, ()))}"
        )


def per_expert(experts: int, rule: Callable[[int], Rule]) -> tuple[Rule, ...]:
    """A rule for each expert, which it is given."""
    return tuple(map(rule, range(experts)))


def _swapped(values: tuple[int, ...]) -> tuple[int, ...]:
    return (*values[:-2], values[-1], values[-2])
