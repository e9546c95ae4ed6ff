"""How far one record is from another: the first difference that rounding does not explain, and the largest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite, isnan

import torch
from torch import Tensor

from lightning_tex.testing.recording import Record

# A tensor smaller than this share of all gradients, or of all parameters, is held to that share in place of its own
# 2-norm: one that is zero in theory (a bias before a softmax, of keys, before a batch norm) is rounding alone.
FLOOR = 1e-3


@dataclass(frozen=True)
class Difference:
    """A tensor or number that is not what one process has.

    Args:
        what: a clause such as ``step 1: gradient of experts.up differs``.
        relative: the 2-norm of the difference over that of what is expected, which counts as at least a thousandth of
            the 2-norm of all gradients or parameters; ``None`` where there is no such number.
    """

    what: str
    relative: float | None = None

    def __str__(self) -> str:
        return self.what + ("" if self.relative is None else f" by {self.relative:.2g} of its 2-norm")


def differences(expected: Record, actual: Record, tolerance: float) -> tuple[Difference | None, dict[str, float]]:
    """The first difference above the tolerance, and the largest of each kind.

    In the order: the number of steps; in each step the loss, the gradients, their norm; at the end the parameters.
    """
    first: Difference | None = None
    worst: dict[str, float] = {}

    def compare(kind: str, what: str, one: Tensor, other: Tensor, floor: float = 0.0) -> None:
        nonlocal first
        relative = relative_difference(one, other, floor)
        largest = worst.get(kind, 0.0)
        worst[kind] = largest if isnan(largest) or relative < largest else relative
        if first is None and not relative <= tolerance:
            first = Difference(f"{what} differs", relative) if isfinite(relative) else _without_number(what, one, other)

    if len(expected.steps) != len(actual.steps):
        first = Difference(f"the number of steps is {len(actual.steps)}, in one process {len(expected.steps)}")
    for number, (one, other) in enumerate(zip(expected.steps, actual.steps, strict=False), 1):
        compare("loss", f"step {number}: loss", _number(one.loss), _number(other.loss))
        floor = FLOOR * _norm(one.gradients.values())
        for name, gradient in one.gradients.items():
            compare("gradients", f"step {number}: gradient of {name}", gradient, other.gradients[name], floor)
        norms = _number(one.gradient_norm), _number(other.gradient_norm)
        compare("gradient norm", f"step {number}: gradient norm", *norms)
    floor = FLOOR * _norm(expected.parameters.values())
    for name, parameter in expected.parameters.items():
        compare("parameters", f"parameter {name} after the last step", parameter, actual.parameters[name], floor)
    return first, worst


def relative_difference(expected: Tensor, actual: Tensor, floor: float = 0.0) -> float:
    """The 2-norm of the difference over that of what is expected, or over ``floor`` where that is larger.

    Where both are 0 it is the 2-norm of the difference alone; for other shapes infinite.
    """
    if expected.shape != actual.shape:
        return float("inf")
    difference = float(torch.linalg.vector_norm(expected.double() - actual.double()))
    size = max(float(torch.linalg.vector_norm(expected.double())), floor)
    return difference / size if size else difference


def _without_number(what: str, expected: Tensor, actual: Tensor) -> Difference:
    if expected.shape != actual.shape:
        return Difference(f"{what} is of shape {list(actual.shape)}, in one process {list(expected.shape)}")
    either = "" if expected.isfinite().all() else " in one process either"
    return Difference(f"{what} is not finite{either}")


def _norm(tensors: Iterable[Tensor]) -> float:
    """The 2-norm of all together."""
    return sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
