"""What the optimizer keeps, in which form, on which ranks; and how much it may take besides while it steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_tex.optim.compact import CompactStates, RoundedMaster, SplitMaster
from lightning_tex.optim.engine import fastest
from lightning_tex.optim.flat import FlatBuffer
from lightning_tex.optim.flat_sizes import ALIGNMENT, most_elements
from lightning_tex.optim.formats import LOW_PRECISION, PlainStates, SavedSize, StateFormat
from lightning_tex.optim.gradients import FullGradients, Gradients
from lightning_tex.optim.moments import Fp32Moments, Int8Moments, RoundedMoments
from lightning_tex.optim.probe import Probed, try_steps
from lightning_tex.optim.rounding import Rounding, RoundingSeed
from lightning_tex.optim.sharded_gradients import ShardedGradients
from lightning_tex.parallel.device import device_type
from lightning_tex.parallel.errors import UserValueError

OptimizerStateFormat = Literal["fp32", "split", "int8", "stochastic"]
OPTIMIZER_STATE_FORMATS: tuple[OptimizerStateFormat, ...] = get_args(OptimizerStateFormat)
ZeroStage = Literal[0, 1, 2]
ZERO_STAGES: tuple[ZeroStage, ...] = get_args(ZeroStage)


@dataclass(frozen=True)
class OptimizerStateConfig:
    """What the optimizer keeps, in which form, on which ranks.

    Args:
        zero_stage: 0: every replica keeps all states and gradients; 1: states are sharded over replicas; 2: gradients
            as well.
        optimizer_state_format: of bf16 parameters. ``fp32``: master and states in fp32. ``split``: the master as
            parameter and 16-bit remainder. ``int8``: that, and states in 8 bits. ``stochastic``: no master, states in
            bf16, both rounded stochastically. Parameters of other dtypes are always kept plainly.
        masters: with ``fp32``, 16-bit parameters have an fp32 master; False: they and their states are all there is.
        tile_size: elements in one tile, rounded up to a multiple of 64 where kernels (fused) or formats (int8) need
            it; ``None``: as many as fit the budget, by the temporaries that the user's optimizer was seen to need.
        seed: of stochastic rounding; the same on all ranks.
        max_skipped_steps: a step with a gradient that is infinite or NaN is skipped, and this many in a row are an
            error; ``None``: such steps are taken.
    """

    zero_stage: ZeroStage = 1
    optimizer_state_format: OptimizerStateFormat = "fp32"
    masters: bool = True
    tile_size: int | None = None
    seed: int = 0
    max_skipped_steps: int | None = None

    def __post_init__(self) -> None:
        for option, value, legal in (
            ("zero_stage", self.zero_stage, ZERO_STAGES),
            ("optimizer_state_format", self.optimizer_state_format, OPTIMIZER_STATE_FORMATS),
        ):
            if value not in legal:
                raise UserValueError(f"{option}={value!r}; legal: {', '.join(map(repr, legal))}")
        if self.tile_size is not None and self.tile_size < 1:
            raise UserValueError(f"tile_size={self.tile_size} elements; legal: 1 or more, or None")
        if self.max_skipped_steps is not None and self.max_skipped_steps < 1:
            raise UserValueError(f"max_skipped_steps={self.max_skipped_steps}; legal: 1 or more, or None")

    def gradients(self, buffer: FlatBuffer) -> Gradients:
        """Gradients for a buffer's parameters."""
        return ShardedGradients(buffer) if self.zero_stage == 2 else FullGradients(buffer)

    def tiled_states(
        self, optimizer: Optimizer, group: dict[str, Any], probed: Probed, rounding_seed: RoundingSeed
    ) -> Callable[[FlatBuffer], StateFormat]:
        """How to make states, in tiles, for buffers of a group.

        Args:
            optimizer, group: the user's.
            probed: of the optimizer.
            rounding_seed: for formats that round at random.

        Raises:
            ValueError: a format for parameters or states that it is not made for.
        """
        name = type(optimizer).__name__
        tiles: dict[torch.dtype, int] = {}
        saved: dict[torch.dtype, SavedSize] = {}

        def states(buffer: FlatBuffer) -> StateFormat:
            dtype = buffer.parameters.dtype
            if dtype not in tiles:
                self._require_floating(name, dtype, probed)

                def trial(own: Tensor, tile_size: int) -> StateFormat:
                    largest = max(buffer.entries, key=lambda entry: entry.stop - entry.start)
                    return self.states(
                        own, tile_size, probed, Rounding(rounding_seed, [largest], largest.start, own.device)
                    )

                tried = try_steps(optimizer, group, buffer.parameters, trial)
                saved[dtype] = tried.saved
                tile = self.tile_size or most_elements(tried.temporary_bytes, device_type(buffer.parameters))
                anywhere = self.optimizer_state_format != "int8" and not fastest(optimizer, group).get("fused")
                tiles[dtype] = tile if anywhere else -(-tile // ALIGNMENT) * ALIGNMENT
            rounding = Rounding(rounding_seed, buffer.entries, buffer.own_start, buffer.parameters.device)
            made = self.states(buffer.own, tiles[dtype], probed, rounding)
            made.saved_size = saved[dtype]
            return made

        return states

    def _require_floating(self, name: str, dtype: torch.dtype, probed: Probed) -> None:
        """Refuse to round what is no floating-point number."""
        if self.optimizer_state_format != "fp32" and dtype in LOW_PRECISION and probed.not_floating:
            odd = ", ".join(f"{key!r} ({kind})" for key, kind in sorted(probed.not_floating.items()))
            raise UserValueError(
                f"optimizer {name} keeps {odd} for every element, and "
                f"optimizer_state_format={self.optimizer_state_format!r} is for floating-point numbers; legal: 'fp32'"
            )

    def states(self, own: Tensor, tile_size: int, probed: Probed, rounding: Rounding) -> StateFormat:
        """How the states of a shard are kept.

        Args:
            own, tile_size: see :class:`StateFormat`.
            probed: of the optimizer.
            rounding: random bits for the shard's elements.

        Raises:
            ValueError: a format that is not made for the parameters.
        """
        if own.dtype not in LOW_PRECISION:
            return PlainStates(own, tile_size, master=False)
        if self.optimizer_state_format == "fp32":
            return PlainStates(own, tile_size, master=self.masters)
        if own.dtype != torch.bfloat16:
            raise UserValueError(
                f"optimizer_state_format={self.optimizer_state_format!r} is made for bf16 parameters, and these are "
                f"{own.dtype}; legal: 'fp32', or precision='bf16-mixed' or 'bf16-true'"
            )
        if self.optimizer_state_format == "split":
            return CompactStates(own, tile_size, SplitMaster(own), Fp32Moments(own))
        if self.optimizer_state_format == "int8":
            return CompactStates(own, tile_size, SplitMaster(own), Int8Moments(own, probed.nonnegative, rounding))
        return CompactStates(own, tile_size, RoundedMaster(own, rounding), RoundedMoments(own, rounding))
