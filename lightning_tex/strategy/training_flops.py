"""Analytic FLOPs of what a run trains, and the peak of its devices: what MFU is logged from."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from lightning_tex.planner.cluster import Cluster
from lightning_tex.planner.describe import describe
from lightning_tex.planner.layers import Other
from lightning_tex.planner.model import ModelDescription
from lightning_tex.planner.model_flops import token_flops

# Kinds of modules that have matrices and compute no product with them.
_NO_PRODUCTS = ("Embedding", "EmbeddingBag")


@dataclass(frozen=True)
class TrainingFlops:
    """What a run computes, by the planner's formulas.

    Args:
        model: what is trained.
        peak: FLOP/s of one device; ``None`` where no data sheet says it.
        unknown: kinds of its modules whose products no formula has.
    """

    model: ModelDescription
    peak: float | None
    unknown: tuple[str, ...]
    _of_token: dict[int, float] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, module: nn.Module, device: torch.device, precision: str) -> TrainingFlops:
        """Those of a module, sharded or not, on devices of one kind.

        Args:
            module: what is trained.
            device: one of the devices.
            precision: the Trainer's.
        """
        model = describe(module)
        places = {parameter.layer for parameter in model.parameters if len(parameter.shape) > 1}
        layers = [model.layers[place].layer for place in sorted(places)]
        unknown = [one.kind for one in layers if isinstance(one, Other) and one.kind not in _NO_PRODUCTS]
        return cls(model, peak_flops(device, precision), tuple(dict.fromkeys(unknown)))

    def of_token(self, length: int) -> float:
        """FLOPs of training on one token of a sequence of that length (:mod:`lightning_tex.planner.work`)."""
        if length not in self._of_token:
            self._of_token[length] = token_flops(self.model, length)
        return self._of_token[length]


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s of a device's products in a Trainer's precision by its data sheet; ``None`` where none is known."""
    sheet = Cluster.of_device(device)
    faster = precision == "32-true" and torch.get_float32_matmul_precision() != "highest"
    return None if sheet is None or faster or precision == "64-true" else sheet.peak(precision)
