"""What one run showed, and how far it is from another one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Record:
    """What one run showed: per optimizer step, or by parameter name. Parameters and gradients are whole."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)  # the steps are the last dim
    parameters: dict[str, Tensor] = field(default_factory=dict)
    overflowed: int = 0


def distances(got: Tensor, expected: Tensor) -> Tensor:
    """||got - expected|| / ||expected|| by last index; ||got|| where the other is 0."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    last = got.shape[-1]
    norm, difference = (t.reshape(-1, last).norm(dim=0) for t in (expected, got - expected))
    return torch.where(norm == 0, difference, difference / norm)


def distance(got: Tensor, expected: Tensor) -> float:
    """The same of whole tensors."""
    return float(distances(got.unsqueeze(-1), expected.unsqueeze(-1)))


def errors(got: Record, expected: Record, kind_of: dict[str, str]) -> dict[str, float]:
    """The worst relative error of losses, norms, and parameters and gradients of each kind; NaN where anything is."""
    names = expected.parameters.keys()
    assert names == expected.gradients.keys() == got.parameters.keys() == got.gradients.keys()
    assert all(g.shape[-1] == len(expected.losses) == len(expected.norms) > 0 for g in expected.gradients.values())
    found = {
        "loss": [distances(*(torch.tensor([r.losses], dtype=torch.float64) for r in (got, expected)))],
        "norm": [distances(*(torch.tensor([r.norms], dtype=torch.float64) for r in (got, expected)))],
    }
    for name in names:
        parameters = (r.parameters[name].unsqueeze(-1) for r in (got, expected))
        gradients = (r.gradients[name] for r in (got, expected))
        found.setdefault(f"{kind_of[name]} parameters", []).append(distances(*parameters))
        found.setdefault(f"{kind_of[name]} gradients", []).append(distances(*gradients))
    # torch's max, unlike Python's, keeps a NaN.
    return {key: float(torch.cat(each).max()) for key, each in found.items()}
