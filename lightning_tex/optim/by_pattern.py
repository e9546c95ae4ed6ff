"""Which parameters are trained, and how fast, by patterns of their names."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pydoc import locate
from typing import Any

from torch import nn

from lightning_tex.parallel.errors import UserValueError

# A pattern is held, with the shell's wildcards, to every run of consecutive words of a parameter's name.


def train_only(
    root: nn.Module,
    trainable: Sequence[str] | None = None,
    frozen: Sequence[str] = (),
    beside: Collection[str] = (),
) -> None:
    """Freeze parameters by name: they have no gradient, no states of an optimizer, and stay as they are.

    It is called where the model is built (``__init__`` or ``configure_model``), before a strategy takes it. A pattern
    is held, with the shell's wildcards, to any consecutive words of a name: of
    ``decoder.blocks.0.attention.query.weight`` these are ``attention``, ``blocks.0``, ``query.weight``,
    ``blocks.*.query`` and others. A parameter of several names has all of them.

    Args:
        root: the model.
        trainable: patterns of what is trained, all else is frozen; ``None``: all is trained.
        frozen: patterns of what is frozen of it.
        beside: names of parameters that are trained besides ``trainable``, such as adapters.

    Raises:
        ValueError: a pattern that is no parameter's, with the nearest names, or nothing left to train.
    """
    names = _names(root)
    for option, patterns in (("trainable", trainable or ()), ("frozen", frozen)):
        for pattern in patterns:
            _require(option, pattern, [name for every in names.values() for name in every])
    parameters = {id(parameter): parameter for parameter in root.parameters()}
    for identity, every in names.items():
        wanted = trainable is None or _any(trainable, every) or any(name in beside for name in every)
        parameters[identity].requires_grad_(wanted and not _any(frozen, every))
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserValueError(f"trainable={trainable}, frozen={list(frozen)} leave nothing to train")


def scaled_groups(
    root: nn.Module, groups: Iterable[Mapping[str, Any]], lr: float | None, lr_scale: Mapping[str, float]
) -> list[dict[str, Any]]:
    """An optimizer's groups, divided by learning rate.

    A scheduler that multiplies the groups' rates (``LambdaLR``, ``LinearLR``, and others) keeps their ratios.

    Args:
        root: the model.
        groups: as torch's optimizers take them; frozen parameters are left out.
        lr: of a group without one of its own.
        lr_scale: by pattern, as of :func:`train_only`, what the rate of a parameter is multiplied with; of several
            patterns that are a parameter's the first counts.

    Returns:
        of each group its parameters of no pattern, then those of each pattern, without what is empty.

    Raises:
        ValueError: a pattern that is of no trained parameter, a factor that is not above 0, or no ``lr``.
    """
    names = _names(root)
    trained = [name for p in root.parameters() if p.requires_grad for name in names[id(p)]]
    for pattern, factor in lr_scale.items():
        if not 0 < factor < math.inf:
            raise UserValueError(f"lr_scale[{pattern!r}]={factor}; legal: above 0 (frozen=[{pattern!r}] trains none)")
        _require("lr_scale", pattern, trained, " that is trained")
    divided = []
    for group in groups:
        rate = group.get("lr", lr)
        if rate is None:
            raise UserValueError("lr_scale needs the optimizer's lr as a number; legal: --optimizer.lr 1e-3")
        parts: dict[str | None, list[nn.Parameter]] = {None: [], **{pattern: [] for pattern in lr_scale}}
        for parameter in group["params"]:
            if parameter.requires_grad:
                parts[_first(lr_scale, names[id(parameter)])].append(parameter)
        divided += [
            {**group, "params": parameters, "lr": rate * (1.0 if pattern is None else lr_scale[pattern])}
            for pattern, parameters in parts.items()
            if parameters
        ]
    return divided


def optimized_parameters(module: nn.Module, optimizer: Mapping[str, Any]) -> Iterable[Any]:
    """What an optimizer that a recipe names is given: the module's parameters, in groups if it has an ``lr_scale``.

    Args:
        module: the model.
        optimizer: its ``class_path`` and ``init_args``.
    """
    lr_scale: Mapping[str, float] | None = getattr(module, "lr_scale", None)
    groups_of = own_groups(optimizer)
    if groups_of is None and not lr_scale:
        return module.parameters()
    groups = [{"params": list(module.parameters())}] if groups_of is None else groups_of(module)
    if not lr_scale:
        return groups
    return scaled_groups(module, groups, optimizer.get("init_args", {}).get("lr"), lr_scale)


def own_groups(optimizer: Mapping[str, Any]) -> Callable[[nn.Module], list[dict[str, Any]]] | None:
    """What an optimizer's class makes its groups of a model by, its ``groups_of``; ``None``: it has none."""
    return getattr(locate(optimizer["class_path"]), "groups_of", None)


def _names(root: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter, by its identity."""
    names: dict[int, list[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _matches(pattern: str, name: str) -> bool:
    words = name.split(".")
    runs = (words[start:end] for start in range(len(words)) for end in range(start + 1, len(words) + 1))
    return any(fnmatchcase(".".join(run), pattern) for run in runs)


def _any(patterns: Iterable[str], names: Iterable[str]) -> bool:
    return any(_matches(pattern, name) for name in names for pattern in patterns)


def _first(patterns: Iterable[str], names: Sequence[str]) -> str | None:
    return next((pattern for pattern in patterns if _any([pattern], names)), None)


def _require(option: str, pattern: str, names: Sequence[str], kind: str = "") -> None:
    if any(_matches(pattern, name) for name in names):
        return
    runs = {
        ".".join(words[start:end]): None
        for words in (name.split(".") for name in names)
        for start in range(len(words))
        for end in range(start + 1, len(words) + 1)
    }
    near = get_close_matches(pattern, runs, n=4, cutoff=0.4) or list(runs)[:4]
    raise UserValueError(
        f"{option}: {pattern!r} is of no parameter{kind}; the nearest names are {', '.join(map(repr, near))}. Legal: "
        "patterns of consecutive words of a name, such as 'embedding', 'blocks.0', 'attention.*', 'experts.down'"
    )
