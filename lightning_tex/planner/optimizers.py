"""An optimizer as the planner knows it: its groups of parameters, and what it keeps of each element."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightning_tex.optim.matrices.costs import MatrixCosts
from lightning_tex.planner.model import ModelDescription

# Places of parameters in a model, one tuple for each group.
Grouping = Callable[[ModelDescription], tuple[tuple[int, ...], ...]]


@dataclass(frozen=True)
class Temporaries:
    """Bytes per element that a step allocates and frees again, by how its states are kept."""

    plain: float
    fp32: float
    split: float
    int8: float
    stochastic: float

    def of(self, kept: str) -> float:
        """Those of states that are kept so."""
        return float(getattr(self, kept))


@dataclass(frozen=True)
class StateCosts:
    """What an optimizer keeps and takes with the options of one group.

    Args:
        states: with one value per element.
        number_bytes: of states that a tile has one of.
        temporaries: of a step.
        aligned: tiles are multiples of an alignment, as fused kernels need it.
    """

    states: int
    number_bytes: int
    temporaries: Temporaries
    aligned: bool = True


# Of fused AdamW: two moments, and the step. Temporaries as a trial shows them (optim/probe.py).
ADAMW = StateCosts(2, 4, Temporaries(plain=0, fp32=4, split=8, int8=24 + 4 / 64, stochastic=20))


@dataclass(frozen=True)
class OptimizerDescription:
    """What the planner has to know of an optimizer.

    Args:
        name: its class.
        grouping: which parameters are in which group, in the optimizer's order; others have no states.
        costs: of each group; of all, where there is one.
        assumed: why it is taken for granted, where nobody was asked.
    """

    name: str
    grouping: Grouping
    costs: tuple[StateCosts | MatrixCosts, ...] = (ADAMW,)
    assumed: str = ""

    @property
    def steps_matrices(self) -> bool:
        """Whether some group is stepped as whole matrices."""
        return any(isinstance(costs, MatrixCosts) for costs in self.costs)

    def costs_of(self, group: int) -> StateCosts | MatrixCosts:
        """Those of a group, by its place."""
        return self.costs[group if len(self.costs) > 1 else 0]


def one_group(model: ModelDescription) -> tuple[tuple[int, ...], ...]:
    """All parameters in their order."""
    return (tuple(range(len(model.parameters))),)


def matrices_and_vectors(model: ModelDescription) -> tuple[tuple[int, ...], ...]:
    """Matrices first, then vectors."""
    vectors = [len(parameter.shape) <= 1 for parameter in model.parameters]
    places = range(len(vectors))
    return tuple(p for p in places if not vectors[p]), tuple(p for p in places if vectors[p])


LANGUAGE_MODELS_OWN = OptimizerDescription("AdamW", matrices_and_vectors)


def assumed_adamw(reason: str) -> OptimizerDescription:
    """AdamW over all parameters in one group."""
    return OptimizerDescription("AdamW", one_group, assumed=reason)
