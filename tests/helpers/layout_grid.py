"""Layouts, the options that vary over them, and a deterministic choice of cases that covers all pairs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace

import numpy as np

WORLDS = (1, 2, 4, 8)
EXPERTS = 8


@dataclass(frozen=True, order=True)
class Sizes:
    """A layout as the user writes it."""

    world: int
    tensor: int
    expert: int
    expert_tensor: int

    @property
    def data(self) -> int:
        return self.world // self.tensor

    @property
    def folded(self) -> bool:
        return self.expert_tensor < self.tensor

    def __str__(self) -> str:
        return f"w{self.world}-t{self.tensor}-e{self.expert}-et{self.expert_tensor}"


@dataclass(frozen=True)
class Options:
    """Everything else that varies. The defaults are the usual ones."""

    capacity: bool = False
    top_2: bool = False
    duplicate_token_dropping: bool = True
    adamw: bool = False
    accumulate: bool = False
    clip: bool = False
    swiglu: bool = False
    tied: bool = False
    small_tiles: bool = False
    z_loss: bool = False
    collect: bool = False
    chunks: bool = False

    def __str__(self) -> str:
        return "-".join(
            (
                "cap" if self.capacity else "dropless",
                "k2" if self.top_2 else "k1",
                "dtd" if self.duplicate_token_dropping else "nodtd",
                "adamw" if self.adamw else "sgd",
                "acc2" if self.accumulate else "acc1",
                "clip" if self.clip else "noclip",
                "swiglu" if self.swiglu else "gelu",
                "tied" if self.tied else "untied",
                "tile64" if self.small_tiles else "tile8M",
                "z" if self.z_loss else "noz",
                "collect" if self.collect else "auto",
                "chunks" if self.chunks else "whole",
            )
        )

    def mathematics(self) -> Options:
        """The options without those that must not change any number: what a reference depends on."""
        return replace(self, duplicate_token_dropping=True, small_tiles=False, collect=False, chunks=False)


@dataclass(frozen=True)
class Case:
    sizes: Sizes
    options: Options

    def __str__(self) -> str:
        return f"{self.sizes}-{self.options}"


NAMES = tuple(field.name for field in fields(Options))


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def layouts() -> list[Sizes]:
    """Every legal layout of the worlds for a model of 8 experts and 8 heads."""
    return [
        Sizes(world, tensor, expert, expert_tensor)
        for world in WORLDS
        for tensor in divisors(world)
        for expert_tensor in sorted({1, tensor}, reverse=True)
        for expert in divisors(world // expert_tensor)
        if EXPERTS % expert == 0
    ]


def legal(case: Case) -> bool:
    return case.options.duplicate_token_dropping or not case.sizes.folded


def all_options() -> list[Options]:
    return [Options(*values) for values in itertools.product((False, True), repeat=len(NAMES))]


def grid() -> list[Case]:
    """Every legal layout with every combination of the five options that change how a step is communicated or taken.

    The seven others rotate: each is a sum modulo 2 of some of the five, and the other way around on every other layout.
    Different sums of independent bits are independent in pairs, so every layout by itself sees all pairs of all twelve.
    Layouts of a kind share their mathematics, hence their references.
    """
    return [
        case
        for i, sizes in enumerate(layouts())
        for five in itertools.product((False, True), repeat=5)
        if legal(case := Case(sizes, _rotated(bool(i % 2), *five)))
    ]


def _rotated(
    turn: bool, capacity: bool, duplicate_token_dropping: bool, adamw: bool, accumulate: bool, clip: bool
) -> Options:
    return Options(
        capacity=capacity,
        duplicate_token_dropping=duplicate_token_dropping,
        adamw=adamw,
        accumulate=accumulate,
        clip=clip,
        top_2=capacity ^ adamw ^ accumulate ^ turn,
        swiglu=capacity ^ adamw ^ clip ^ turn,
        tied=capacity ^ accumulate ^ clip ^ turn,
        z_loss=adamw ^ accumulate ^ clip ^ turn,
        small_tiles=capacity ^ adamw ^ accumulate ^ clip ^ turn,
        collect=accumulate ^ clip ^ turn,
        chunks=capacity ^ clip ^ turn,
    )


def option_pairs(options: Options) -> set[tuple[object, ...]]:
    """All pairs of option values that a set of options covers."""
    return set(itertools.combinations(_values(options), 2))


def pairwise() -> list[Case]:
    """Greedy: per layout the options that cover most pairs not covered yet, until all its option values are seen.

    Covers every legal (layout, option value) and every (option value, option value).
    """
    options = all_options()
    values = np.array([[value for _, value in _values(each)] for each in options], dtype=int)  # [options, names]
    first, second = np.triu_indices(len(NAMES), 1)
    pairs = (first * len(NAMES) + second) * 4 + 2 * values[:, first] + values[:, second]  # [options, pairs of names]
    open_pairs, used = np.zeros(4 * len(NAMES) ** 2, dtype=bool), np.zeros(len(options), dtype=int)
    open_pairs[pairs] = True
    chosen: list[Case] = []
    for sizes in layouts():
        allowed = np.array([legal(Case(sizes, each)) for each in options])
        open_values = np.zeros((len(NAMES), 2), dtype=bool)
        open_values[range(len(NAMES)), values[allowed]] = True
        while open_values.any():
            covered = open_values[range(len(NAMES)), values].sum(1) + open_pairs[pairs].sum(1)
            best = np.lexsort((_mixed(sizes, values), -used, covered, allowed))[-1]
            chosen.append(Case(sizes, options[best]))
            used[best] += 1
            open_values[range(len(NAMES)), values[best]] = False
            open_pairs[pairs[best]] = False
    assert not open_pairs.any()
    return chosen


def _values(options: Options) -> tuple[tuple[str, bool], ...]:
    return tuple((name, getattr(options, name)) for name in NAMES)


def _mixed(sizes: Sizes, values: np.ndarray) -> np.ndarray:
    """Fixed numbers that look random: they break ties so that layouts do not all get the same two option sets."""
    bits = (values << np.arange(len(NAMES))).sum(1)
    layout = sizes.world * 64 + sizes.tensor * 16 + sizes.expert * 4 + sizes.expert_tensor
    return (bits * 2654435761 + layout * 40503) % 1000003


def pairs_of_layouts(case: Case) -> set[tuple[object, ...]]:
    """All pairs of a layout with an option value that a case covers."""
    return {(case.sizes, value) for value in _values(case.options)}
