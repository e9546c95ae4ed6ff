"""The buffers of a run: parameters that the same optimizers step lie together, with one gradient for all of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_tex.optim.flat import FlatBuffer, Member, buckets, kind
from lightning_tex.optim.formats import LOW_PRECISION
from lightning_tex.optim.forward_overlap import ForwardOverlap
from lightning_tex.optim.gradient_reducer import GradientReducer
from lightning_tex.optim.gradients import Gradients
from lightning_tex.optim.joint_reducer import JointReducer
from lightning_tex.optim.state_config import OptimizerStateConfig
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.layout import Communication
from lightning_tex.parallel.sharding import ParameterSharding
from lightning_tex.parallel.topology import Axis

LaidOut = tuple[FlatBuffer, Gradients]


class RunBuffers:
    """What the optimizers of a run step: flat buffers of parameters, their gradients, and what combines these.

    Args:
        optimizers: the user's, all of the run.
        shardings: parameter -> sharding.
        world: all ranks, over which norms are summed.
        state_config: what is kept, in which form and where; ``None``: the defaults.
        communication: what is done to communicate less; ``None``: the defaults.

    Attributes:
        gathering: brings stepped parameters to all ranks.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        shardings: Mapping[nn.Parameter, ParameterSharding],
        world: Axis,
        state_config: OptimizerStateConfig | None = None,
        communication: Communication | None = None,
    ) -> None:
        self.shardings, self.world = shardings, world
        self.state_config = state_config or OptimizerStateConfig()
        self._communication = communication or Communication()
        self.gathering = ForwardOverlap()
        self._steppers: dict[nn.Parameter, tuple[tuple[int, int], ...]] = {}
        for number, optimizer in enumerate(optimizers):
            for place, group in enumerate(optimizer.param_groups):
                for parameter in group["params"]:
                    self._steppers[parameter] = (*self._steppers.get(parameter, ()), (number, place))
        self._numbers = {id(optimizer): number for number, optimizer in enumerate(optimizers)}
        self._reducers: dict[frozenset[int], GradientReducer] = {}
        self._laid_out: dict[nn.Parameter, LaidOut] = {}

    def attend(self, model: nn.Module) -> None:
        """Gather parameters while the next forward of a model runs, if communication is to overlap."""
        if self._communication.overlap:
            self.gathering.attend(model)

    @property
    def are_shared(self) -> bool:
        """Whether some parameter is stepped by two optimizers."""
        return any(len(steppers) > 1 for steppers in self._steppers.values())

    def reducer(self, optimizer: Optimizer) -> GradientReducer | JointReducer:
        """What combines the gradients that an optimizer steps by."""
        own = frozenset({self._numbers[id(optimizer)]})
        shared = {self._optimizers_of(p) for group in optimizer.param_groups for p in group["params"]} - {own}
        if not shared:
            return self._reducer_of(own)
        return JointReducer([self._reducer_of(who) for who in [own, *sorted(shared, key=sorted)]])

    def lay_out(self, optimizer: Optimizer, members: Sequence[Member]) -> list[LaidOut]:
        """Buffers of parameters of one group, and their gradients, made by the first optimizer that asks.

        Raises:
            ValueError: parameters that another optimizer steps already, of a group that came later.
        """
        number = self._numbers[id(optimizer)]
        found: dict[int, LaidOut] = {}
        kinds: dict[tuple[object, ...], list[Member]] = {}
        for parameter, sharding in members:
            steppers = self._steppers.setdefault(parameter, ((number, -1),))
            if number not in self._optimizers_of(parameter):
                raise UserValueError(
                    f"{sharding.name} was added to optimizer {number} ({type(optimizer).__name__}) while optimizer "
                    f"{steppers[0][0]} steps it: its gradient and states are laid out; legal: give it to both in "
                    "configure_optimizers"
                )
            if parameter in self._laid_out:
                laid_out = self._laid_out[parameter]
                found[id(laid_out[0])] = laid_out
            else:
                kinds.setdefault((kind(parameter, sharding), steppers), []).append((parameter, sharding))
        for alike in kinds.values():
            new = [self._made(bucket) for bucket in buckets(alike)]
            self._reducer_of(self._optimizers_of(alike[0][0])).add([gradients for _, gradients in new])
            found |= {id(buffer): (buffer, gradients) for buffer, gradients in new}
        return list(found.values())

    def _made(self, members: Sequence[Member]) -> LaidOut:
        buffer = FlatBuffer(members, sharded=self.state_config.zero_stage > 0)
        made = buffer, self.state_config.gradients(buffer)
        self._laid_out |= {parameter: made for parameter, _ in members}
        return made

    def _optimizers_of(self, parameter: nn.Parameter) -> frozenset[int]:
        return frozenset(number for number, _ in self._steppers[parameter])

    def _reducer_of(self, who: frozenset[int]) -> GradientReducer:
        if who not in self._reducers:
            at_once, shared = self.state_config.zero_stage == 2, len(who) > 1
            self._reducers[who] = GradientReducer(self.shardings, self.world, self._communication, at_once, shared)
        return self._reducers[who]


def require_sharable(
    optimizers: Sequence[Optimizer], names: Mapping[nn.Parameter, str], state_config: OptimizerStateConfig
) -> None:
    """Refuse a parameter of two optimizers that each would keep in more precision than it has.

    Raises:
        ValueError: naming it, the optimizers and the remedy.
    """
    plain = state_config.optimizer_state_format == "fp32" and not state_config.masters
    first: dict[nn.Parameter, int] = {}
    for number, optimizer in enumerate(optimizers):
        for parameter in (p for group in _groups(optimizer) for p in group["params"]):
            other = first.setdefault(parameter, number)
            if other != number and parameter.dtype in LOW_PRECISION and not plain:
                raise UserValueError(
                    f"{names.get(parameter, 'a parameter')} is in optimizer {other} "
                    f"({type(optimizers[other]).__name__}) and in optimizer {number} ({type(optimizer).__name__}): "
                    "each would step values of its own behind the 16 bits; legal: each parameter in one optimizer, or "
                    "precision='32-true', '64-true', or 'bf16-true' with optimizer_state_format='fp32'"
                )


def _groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    return optimizer.param_groups
