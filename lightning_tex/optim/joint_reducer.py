"""The gradients of an optimizer that shares some of its parameters with others: those of several reducers as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_tex.optim.gradient_reducer import UNKNOWN, GradientReducer
from lightning_tex.optim.reduction_stage import ReductionStage, ReductionState


class JointReducer:
    """Several :class:`GradientReducer` as one, of which the first is the optimizer's own.

    The others are those of parameters that further optimizers step, too; what is done to their gradients, such as
    clipping, these see as well.

    Args:
        reducers: two or more.
    """

    def __init__(self, reducers: Sequence[GradientReducer]) -> None:
        self._reducers = list(reducers)

    @property
    def each(self) -> list[GradientReducer]:
        """Those that there are gradients for."""
        return [reducer for reducer in self._reducers if reducer.buffers]

    @property
    def state(self) -> ReductionState:
        """Of the gradients of the optimizer, which are never scaled on their way but in their place."""
        states = [reducer.state for reducer in self.each]
        return next((state for state in states if state.stage is ReductionStage.UNSCALED), states[0])

    def release(self) -> None:
        """Take the hooks from the parameters."""
        for reducer in self.each:
            reducer.release()

    def zero(self, set_to_none: bool = True) -> None:
        """Begin a step, whatever became of the one before."""
        for reducer in self.each:
            reducer.zero(set_to_none)

    def step_is_over(self) -> None:
        """The gradients have been used, or the step was skipped."""
        for reducer in self.each:
            reducer.step_is_over()

    def backward_begins(self, loss: Tensor, last: bool, undisturbed: bool) -> None:
        """See :meth:`TiledOptimizer.backward_begins`."""
        for reducer in self.each:
            reducer.backward_begins(loss, last, undisturbed)

    def backward_ended(self) -> None:
        """See :meth:`TiledOptimizer.backward_ended`; collective."""
        for reducer in self.each:
            reducer.backward_ended()

    def combine(self, whole: bool = False) -> None:
        """See :meth:`GradientReducer.combine`; collective."""
        for reducer in self.each:
            reducer.combine(whole)

    def unscale(self, factor: float | Tensor) -> None:
        """Take the loss scale out of the gradients from which it has not been taken; collective."""
        for reducer in self.each:
            if reducer.state.stage is not ReductionStage.UNSCALED:
                reducer.unscale(factor)
                reducer.scale_in_place()

    def norm(self) -> Tensor:
        """The 2-norm of all gradients: an fp64 scalar; collective."""
        return torch.stack([reducer.norm() for reducer in self.each]).square().sum().sqrt()

    @property
    def losses(self) -> list[Tensor]:
        """This rank's losses of the step."""
        return self.each[0].losses

    def finite(self) -> Tensor:
        """See :meth:`GradientReducer.finite`; collective."""
        return torch.stack([reducer.finite() for reducer in self.each]).all()

    def losses_finite(self) -> Tensor:
        """See :meth:`GradientReducer.losses_finite`; collective."""
        return self.each[0].losses_finite()

    @property
    def host_waits(self) -> bool:
        """Whether to look at a value would keep the host waiting for a device."""
        return self.each[0].host_waits

    def clip_by_norm(self, max_norm: float) -> Tensor:
        """See :meth:`GradientReducer.clip_by_norm`; collective."""
        norm = self.norm()
        for reducer in self.each:
            reducer.scale_to(norm, max_norm)
            reducer.scale_in_place()
        return norm

    def clip_by_value(self, max_value: float) -> None:
        """See :meth:`GradientReducer.clip_by_value`; collective."""
        for reducer in self.each:
            reducer.clip_by_value(max_value)

    def culprit(self) -> str:
        """See :meth:`GradientReducer.culprit`; collective."""
        told = [reducer.culprit() for reducer in self.each]
        return next((one for one in told if one != UNKNOWN), UNKNOWN)
