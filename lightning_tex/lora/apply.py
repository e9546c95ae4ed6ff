"""Giving a model adapters, and freezing all else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_tex.layers import ColumnParallelLinear, RowParallelLinear
from lightning_tex.layers.adapters import AdaptedLinear, Adapter, LowRank
from lightning_tex.lora.config import LoRAConfig, matches
from lightning_tex.moe.experts import Experts
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.sharding import tex_modules


class Target(NamedTuple):
    """A matrix that may be given an adapter.

    Args:
        weight: the name of its parameter.
        matrix: the parameter, whole.
        attach: gives it an adapter of this configuration.
    """

    weight: str
    matrix: Tensor
    attach: Callable[[LoRAConfig], None]


class Adapted(NamedTuple):
    """A matrix that has an adapter.

    Args:
        weight: the name of its parameter.
        prefix: of the adapter's, which are ``{prefix}.a`` and ``{prefix}.b``.
        adapter: the module.
    """

    weight: str
    prefix: str
    adapter: LowRank


def apply_lora(root: nn.Module, config: LoRAConfig) -> list[str]:
    """Freeze a model and give it adapters, which alone are trained from then on.

    It is called where the model is built (``__init__`` or ``configure_model``), before a strategy shards it, and may
    be of any module: TEX layers, their experts, and plain ``torch.nn.Linear`` layers that every rank holds.

    Args:
        root: the model.
        config: which matrices, and of which rank.

    Returns:
        names of the adapted matrices.

    Raises:
        ValueError: a pattern that is no matrix's; dropout for experts; a model that has adapters or is sharded.
    """
    if any(module.bound for _, module in tex_modules(root)):
        raise UserValueError("apply_lora comes too late: the model is sharded; legal: in __init__ or configure_model")
    if adapted(root):
        raise UserValueError("apply_lora: the model has adapters already; legal: once, with all targets")
    targets = adaptable(root)
    for pattern in config.targets:
        if not any(matches(pattern, name) for name in targets):
            raise UserValueError(
                f"lora.targets: {pattern!r} is no matrix's name; legal are patterns of {', '.join(_ends(targets))}"
            )
    root.requires_grad_(False)
    chosen = [name for name in targets if config.takes(name)]
    for name in chosen:
        targets[name].attach(config)
    return chosen


def adaptable(root: nn.Module) -> dict[str, Target]:
    """The matrices of a model that may have an adapter, by name."""
    found: dict[str, Target] = {}
    for name, module in root.named_modules():
        if isinstance(module, Experts):
            found.update(_of_experts(name, module))
        elif isinstance(module, ColumnParallelLinear | RowParallelLinear):
            found[name] = _of_parallel(name, module)
        elif type(module) is nn.Linear and name:
            found[name] = _of_plain(root, name, module)
    return found


def adapted(root: nn.Module) -> list[Adapted]:
    """The matrices of a model that have an adapter."""
    found = []
    for name, module in root.named_modules():
        dot = f"{name}." if name else ""
        if isinstance(module, Experts) and module.adapters is not None:
            for own, adapter in module.adapters.items():
                assert isinstance(adapter, LowRank)
                found.append(Adapted(f"{dot}{own}", f"{dot}adapters.{own}", adapter))
        elif isinstance(own_adapter := getattr(module, "adapter", None), Adapter):
            found.append(Adapted(f"{dot}weight", f"{dot}adapter", own_adapter))
    return found


def adapter_names(root: nn.Module) -> set[str]:
    """Names of the adapters' parameters."""
    return {f"{one.prefix}.{factor}" for one in adapted(root) for factor in ("a", "b")}


# --- by kind of layer


def _of_parallel(name: str, layer: ColumnParallelLinear | RowParallelLinear) -> Target:
    def attach(config: LoRAConfig) -> None:
        layer.adapter = _adapter(layer.adapter_type, layer.weight, config)

    return Target(f"{name}.weight", layer.weight, attach)


def _of_plain(root: nn.Module, name: str, layer: nn.Linear) -> Target:
    def attach(config: LoRAConfig) -> None:
        parent, _, own = name.rpartition(".")
        setattr(root.get_submodule(parent), own, AdaptedLinear.of(layer, _adapter(Adapter, layer.weight, config)))

    return Target(f"{name}.weight", layer.weight, attach)


def _of_experts(name: str, experts: Experts) -> Iterator[tuple[str, Target]]:
    for own, kind in experts.adapter_types.items():
        matrix = getattr(experts, own)
        if matrix is not None:
            full = f"{name}.{own}" if name else own
            yield full, Target(full, matrix, _attach_to_expert(experts, own, kind, full))


def _attach_to_expert(experts: Experts, own: str, kind: type[LowRank], full: str) -> Callable[[LoRAConfig], None]:
    def attach(config: LoRAConfig) -> None:
        if config.dropout:
            raise UserValueError(
                f"lora.dropout={config.dropout}, but {full} is adapted as a matrix, which has no input of its own; "
                "legal: dropout=0, or targets without experts"
            )
        matrix = getattr(experts, own)
        with torch.device(matrix.device):
            adapter = kind(tuple(matrix.shape), config.rank, config.scale).to(matrix.dtype)
        if experts.adapters is None:
            experts.adapters = nn.ModuleDict()
        experts.adapters[own] = adapter

    return attach


def _adapter(kind: type[Adapter], weight: Tensor, config: LoRAConfig) -> Adapter:
    with torch.device(weight.device):
        return kind(tuple(weight.shape), config.rank, config.scale, config.dropout).to(weight.dtype)


def _ends(targets: dict[str, Target]) -> list[str]:
    """The last two words of each name, once."""
    return list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in targets))
