"""The dict of a plain checkpoint: what Lightning's own strategies write, and an entry of ours that gives the version.

Every plain checkpoint is written by :func:`versioned` and told apart by :func:`version_of`, here and nowhere else:

    checkpoint["lightning_tex"]     version         written by
    none                            0               Lightning's other strategies; checkpoints of weights alone, of
                                                    which all versions are alike; lightning_tex 0.1, which kept its
                                                    rounding seed in optimizer_states[0] as "dice"
    {"version": 1, ..}              1               lightning_tex: optimizer_states in torch's own form to the letter,
                                                    the rounding seed in this entry
    without a version               CONSOLIDATED    Lightning's consolidate_checkpoint, of a directory: the entry is the
                                                    directory's, whose version is in its manifest; optimizer_states by
                                                    parameter name
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from lightning_tex.optim import Stepped, TiledOptimizer, one_by_one
from lightning_tex.optim.tiled import parameter_names
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.saving.checkpoint_format import OWN_ENTRY
from lightning_tex.saving.model_state import OPTIMIZERS
from lightning_tex.saving.optimizer_loading import OptimizerStates
from lightning_tex.saving.optimizer_state import ROUNDING_SEED
from lightning_tex.saving.whole_tensors import WholeTensors

TORCH_FORM: Final = 0
VERSION: Final = 1
CONSOLIDATED: Final = "directory"


def versioned(checkpoint: Mapping[str, Any], rounding_seed: Mapping[str, int] | None) -> dict[str, Any]:
    """A plain checkpoint, with our entry where it has optimizer states, which alone depend on the version.

    Args:
        checkpoint: Lightning's, with whole tensors.
        rounding_seed: of its optimizer; ``None`` without optimizer states.
    """
    if rounding_seed is None:
        return dict(checkpoint)
    return {**checkpoint, OWN_ENTRY: {"version": VERSION, "rounding_seed": dict(rounding_seed)}}


def torch_form(states: Mapping[str, Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Optimizer states as ``torch.optim.Optimizer.state_dict`` gives them.

    Args:
        states: by parameter name and key.
        groups: options, with parameter names as ``params``.

    Returns:
        ``{"state": {parameter number: {key: value}}, "param_groups": [.. "params": [parameter number]]}``.
    """
    numbers = {name: index for index, name in enumerate(name for group in groups for name in group["params"])}
    return {
        "state": {number: dict(states[name]) for name, number in numbers.items() if name in states},
        "param_groups": [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups],
    }


def version_of(checkpoint: Mapping[str, Any]) -> int | str:
    """Which form a plain checkpoint has: the rule is the table above.

    Raises:
        ValueError: it is of a version that is not known here.
    """
    if OWN_ENTRY not in checkpoint:
        return TORCH_FORM
    version: int | str = checkpoint[OWN_ENTRY].get("version", CONSOLIDATED)
    if version not in (VERSION, CONSOLIDATED):
        raise UserValueError(
            f"the checkpoint is a plain file of version {version}; this version of lightning_tex reads {TORCH_FORM} "
            f"(torch's own form) and {VERSION}"
        )
    return version


def optimizer_states(checkpoint: Mapping[str, Any], stepped: Stepped) -> Iterator[tuple[Stepped, OptimizerStates]]:
    """The optimizer states of a plain checkpoint that has some, with the optimizers that they are for.

    Raises:
        ValueError: they are of other optimizers, or the version is not known.
    """
    every = checkpoint["optimizer_states"]
    version = version_of(checkpoint)
    if version == CONSOLIDATED:
        about = checkpoint[OWN_ENTRY]["optimizer"]
        under = {OPTIMIZERS.format(n): WholeTensors.of_optimizer(one["state"]) for n, one in enumerate(every)}
        yield from OptimizerStates.of_each(about, stepped, under.__getitem__)
        return
    optimizers = one_by_one(stepped)
    if len(every) != len(optimizers):
        raise UserValueError(
            f"the checkpoint has the states of {len(every)} optimizers, and configure_optimizers has returned "
            f"{len(optimizers)}"
        )
    for saved, optimizer in zip(every, optimizers, strict=True):
        seed = saved.get(ROUNDING_SEED) if version == TORCH_FORM else checkpoint[OWN_ENTRY].get("rounding_seed")
        yield optimizer, by_number(saved, seed, optimizer)


def by_number(
    saved: Mapping[str, Any], rounding_seed: Mapping[str, int] | None, optimizer: TiledOptimizer
) -> OptimizerStates:
    """States in torch's own form, for an optimizer of as many groups of as many parameters.

    Raises:
        ValueError: they are of other ones.
    """
    names = parameter_names(optimizer.param_groups, optimizer.shardings)
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != [len(members) for members in names]:
        raise UserValueError(
            f"the checkpoint's optimizer has groups of {sizes} parameters, this one of "
            f"{[len(members) for members in names]}"
        )
    groups = [{**group, "params": members} for group, members in zip(saved["param_groups"], names, strict=True)]
    name_of = {
        number: name
        for group, members in zip(saved["param_groups"], names, strict=True)
        for number, name in zip(group["params"], members, strict=True)
    }
    states = {name_of[number]: values for number, values in saved["state"].items()}
    number_keys = {key for values in states.values() for key, v in values.items() if isinstance(v, (int, float))}
    return OptimizerStates(WholeTensors.of_optimizer(states), groups, frozenset(number_keys), rounding_seed)
