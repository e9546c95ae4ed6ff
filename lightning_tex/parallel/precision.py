"""In which dtype a parameter is stored, by the Trainer's precision and by the module that holds it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_tex.parallel.sharding import TexModule

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


class StoredDtypes(NamedTuple):
    """Dtypes of parameters.

    Args:
        usual: of most, and of activations.
        full: of those that keep full precision, by :func:`keeps_full_precision`.
    """

    usual: torch.dtype
    full: torch.dtype


# The precisions of a Trainer that the strategy knows.
PRECISIONS: dict[str, StoredDtypes] = {
    "32-true": StoredDtypes(torch.float32, torch.float32),
    "64-true": StoredDtypes(torch.float64, torch.float64),
    "bf16-mixed": StoredDtypes(torch.bfloat16, torch.float32),
    "16-mixed": StoredDtypes(torch.float16, torch.float32),
    "bf16-true": StoredDtypes(torch.bfloat16, torch.bfloat16),
    "16-true": StoredDtypes(torch.float16, torch.float16),
}


# Of these the ones whose 16 bits are all there is of a parameter.
WITHOUT_MASTERS = tuple(name for name, dtypes in PRECISIONS.items() if dtypes.full.itemsize == 2)


def keeps_full_precision(module: nn.Module) -> bool:
    """Whether mixed precision leaves a module's own parameters in fp32: routers and norms."""
    return isinstance(module, _NORMS) or (isinstance(module, TexModule) and module.full_precision)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a product with ``x`` is computed in here: autocast's where that is on, else its own."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:  # which autocast leaves as it is
        return torch.get_autocast_dtype(kind)
    return x.dtype
