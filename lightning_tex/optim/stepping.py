"""How the parameters of an optimizer group are stepped: in tiles, or as whole matrices. The seam between the two."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch.optim import Optimizer

from lightning_tex.optim.engine import Engine
from lightning_tex.optim.flat import FlatBuffer
from lightning_tex.optim.formats import LOW_PRECISION
from lightning_tex.optim.gradients import Gradients
from lightning_tex.optim.matrices.costs import MatrixCosts
from lightning_tex.optim.matrices.ownership import Loads
from lightning_tex.optim.matrices.shard import MatrixShard
from lightning_tex.optim.probe import NotElementwiseError, Probed, probe, require_separate
from lightning_tex.optim.rounding import RoundingSeed
from lightning_tex.optim.shard import Shard, TiledShard
from lightning_tex.optim.state_config import OptimizerStateConfig
from lightning_tex.parallel.errors import UserValueError


class Stepping(ABC):
    """Makes the shards of one group.

    Args:
        config: what is kept, in which form.
        optimizer, group: the user's.
    """

    def __init__(self, config: OptimizerStateConfig, optimizer: Optimizer, group: dict[str, Any]) -> None:
        self.config, self.optimizer, self.group = config, optimizer, group
        self.engine = Engine(optimizer)

    @abstractmethod
    def shard(self, buffer: FlatBuffer, gradients: Gradients) -> Shard:
        """That of a buffer of the group's parameters."""


class InTiles(Stepping):
    """Of an elementwise optimizer: windows that cut through parameters.

    Args:
        config, optimizer, group: see :class:`Stepping`.
        probed: of the optimizer.
        rounding_seed: for formats that round at random.
    """

    def __init__(
        self,
        config: OptimizerStateConfig,
        optimizer: Optimizer,
        group: dict[str, Any],
        probed: Probed,
        rounding_seed: RoundingSeed,
    ) -> None:
        super().__init__(config, optimizer, group)
        self._states = config.tiled_states(optimizer, group, probed, rounding_seed)

    def shard(self, buffer: FlatBuffer, gradients: Gradients) -> Shard:
        return TiledShard(buffer, gradients, self.group, self.engine, self._states(buffer))


class AsMatrices(Stepping):
    """Of an optimizer that needs the whole of a parameter or, of a stack of experts, the matrix of each."""

    def __init__(self, config: OptimizerStateConfig, optimizer: Optimizer, group: dict[str, Any]) -> None:
        super().__init__(config, optimizer, group)
        self._costs, self._loads = MatrixCosts(optimizer, group), Loads()

    def shard(self, buffer: FlatBuffer, gradients: Gradients) -> Shard:
        if buffer.parameters.dtype in LOW_PRECISION and self.config.optimizer_state_format != "fp32":
            raise UserValueError(
                f"optimizer {type(self.optimizer).__name__} needs whole matrices, and "
                f"optimizer_state_format={self.config.optimizer_state_format!r} is made for states that are updated in "
                "tiles; legal: 'fp32'"
            )
        return MatrixShard(buffer, gradients, self.group, self.engine, self._costs, self._loads, self.config.masters)


def stepping(
    config: OptimizerStateConfig, optimizer: Optimizer, group: dict[str, Any], rounding_seed: RoundingSeed
) -> Stepping:
    """How a group is stepped, found out by trying.

    Args:
        config: what is kept, in which form.
        optimizer, group: the user's.
        rounding_seed: for formats that round at random.

    Raises:
        ValueError: an optimizer that can be stepped neither way, by name.
    """
    try:
        probed = probe(optimizer, group)
    except NotElementwiseError as reason:
        require_separate(optimizer, group, reason)
        return AsMatrices(config, optimizer, group)
    return InTiles(config, optimizer, group, probed, rounding_seed)
