"""Initial values as a function of (seed, name, global index), so that every layout starts alike."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lightning_tex.parallel.box import Box
from lightning_tex.parallel.errors import UserTypeError
from lightning_tex.parallel.hashing import stable_hash, uniform
from lightning_tex.parallel.sharding import TexModule

_Reset = TypeVar("_Reset", bound=Callable[..., None])


def by_index(reset: _Reset) -> _Reset:
    """Mark a ``reset_parameters`` whose draws depend on global indices only: a rank may draw just its own part."""
    reset.by_index = True  # type: ignore[attr-defined]
    return reset


@torch.no_grad()
def materialise(root: nn.Module, device: torch.device, seed: int, given: Collection[str] = ()) -> None:
    """Give meta parameters memory and values that are a function of (seed, name, global index) alone.

    Values come from the owning module's ``reset_parameters``. A parameter that is not on meta keeps its value.

    Args:
        root: the model, sharded already.
        device: where the parameters go.
        seed: the same on all ranks.
        given: names of parameters whose values will come from elsewhere: where a module has no others they are zero.

    Raises:
        TypeError: a module with meta parameters or buffers has no ``reset_parameters``.
    """
    made: dict[int, nn.Parameter] = {}
    devices, given = [device] if device.type == "cuda" else [], set(given)
    for name, module in root.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        buffers = dict(module.named_buffers(recurse=False))
        if not any(t.is_meta for t in (*parameters.values(), *buffers.values())):
            continue
        reset = getattr(module, "reset_parameters", None)
        if reset is None:
            raise UserTypeError(
                f"{name or 'the model'} ({type(module).__name__}) has parameters or buffers on the meta device but no "
                "reset_parameters(); define it, or build the module on a real device"
            )
        kept = {own: p.detach().clone() for own, p in parameters.items() if not p.is_meta}
        fresh = [own for own, p in parameters.items() if p.is_meta and id(p) not in made]
        for own, parameter in parameters.items():
            if parameter.is_meta:
                empty = nn.Parameter(torch.zeros_like(parameter, device=device), parameter.requires_grad)
                setattr(module, own, made.setdefault(id(parameter), empty))
        kept.update({own: getattr(module, own).clone() for own in parameters if own not in fresh and own not in kept})
        if not any(b.is_meta for b in buffers.values()) and all(f"{name}.{own}" in given for own in fresh):
            continue
        for own, buffer in buffers.items():
            if buffer.is_meta:
                setattr(module, own, torch.empty_like(buffer, device=device))
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(stable_hash(seed, name))
            if isinstance(module, TexModule) and module.bound and not getattr(reset, "by_index", False):
                _reset_whole(module, device)
            else:
                reset()
        for own, value in kept.items():
            getattr(module, own).copy_(value)


def _reset_whole(module: TexModule, device: torch.device) -> None:
    # A user's own reset_parameters draws as if alone: let it draw this one layer whole, then shard it.
    boxes = module.boxes()
    stored = {own: getattr(module, own) for own in boxes}
    for own, box in boxes.items():
        setattr(module, own, nn.Parameter(stored[own].new_empty(box.full, device=device)))
    module.reset_parameters()  # type: ignore[operator]
    for own, box in boxes.items():
        stored[own].copy_(box.shard(getattr(module, own)))
        setattr(module, own, stored[own])


@torch.no_grad()
def init_uniform_(parameter: Tensor, bound: float, box: Box) -> None:
    """Fill a stored part with U(-bound, bound) by global index. Takes one number from torch's random state."""
    if has_values(parameter):
        _fill(parameter, box, lambda index, key: (2 * uniform(index, key) - 1) * bound)


@torch.no_grad()
def init_normal_(parameter: Tensor, std: float, box: Box) -> None:
    """Fill a stored part with N(0, std^2) by global index (Box-Muller). Takes one number from torch's random state."""

    def normal(index: Tensor, key: int) -> Tensor:
        radius = (-2 * torch.log(1 - uniform(index, key))).sqrt()
        return std * radius * torch.cos(2 * torch.pi * uniform(index, key ^ 0x5DEECE66D))

    if has_values(parameter):
        _fill(parameter, box, normal)


def has_values(parameter: Tensor) -> bool:
    """Whether a parameter is more than a shape: neither on the meta device nor one of a trace's."""
    return not parameter.is_meta and not isinstance(parameter, FakeTensor)


def _fill(parameter: Tensor, box: Box, value: Callable[[Tensor, int], Tensor]) -> None:
    key = int(torch.randint(2**62, ()))
    parameter.zero_()
    rows = box.unpadded(parameter)
    if rows.numel() == 0:
        return
    strides = [1] * len(box.full)
    for dim in range(len(box.full) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * box.full[dim + 1]
    steps = [
        torch.arange(start, start + size, device=parameter.device) * stride
        for start, size, stride in zip(box.extent.offsets, box.extent.sizes, strides, strict=True)
    ]
    # Slabs along the first dim bound the temporaries, which are 64 bits wide.
    inner = sum(
        (s.view(-1, *[1] * (len(steps) - 1 - d)) for d, s in enumerate(steps[1:], 1)),
        torch.zeros((), dtype=torch.int64, device=parameter.device),
    )
    slab = max(1, (1 << 20) // max(1, inner.numel()))
    for start in range(0, rows.shape[0], slab):
        first = steps[0][start : start + slab].view(-1, *[1] * (len(steps) - 1))
        rows[start : start + slab] = value(first + inner, key).to(parameter.dtype)
