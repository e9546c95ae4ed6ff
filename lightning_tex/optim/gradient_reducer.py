"""From backwards to the gradients of a step: when they leave, what is combined, what scales and bounds them.

This is inside the optimizer: who runs a step talks to :class:`~lightning_tex.optim.TiledOptimizer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_tex.optim.gradients import Gradients
from lightning_tex.optim.overlap import BucketOverlap, optimizer_pass
from lightning_tex.optim.reduction_stage import ReductionStage, ReductionState
from lightning_tex.optim.square_sums import square_sums
from lightning_tex.parallel import collectives
from lightning_tex.parallel.activation_layout import reached, reached_directly
from lightning_tex.parallel.device import device_type
from lightning_tex.parallel.errors import UserRuntimeError
from lightning_tex.parallel.layout import Communication
from lightning_tex.parallel.sharding import ParameterSharding
from lightning_tex.parallel.topology import Axis

UNKNOWN = "some parameter"  # is what a culprit is called that no rank finds
_IN_BACKWARD = (ReductionStage.IN_BACKWARD, ReductionStage.IN_LAST_BACKWARD)
_COMBINED = (ReductionStage.COMBINED, ReductionStage.UNSCALED)
_NOT_COMBINED = (ReductionStage.COLLECTING, ReductionStage.SENT, ReductionStage.COMPLETE)


class GradientReducer:
    """The gradients of all buffers, from their backwards to the step.

    Args:
        shardings: parameter -> sharding.
        world: all ranks, over which norms are summed.
        communication: what is done to communicate less.
        at_once: they are reduced in every backward (ZeRO 2), not only in the last of a step.
        shared: several optimizers step by them: what is combined stays so until ``zero_grad``.

    Attributes:
        state: what has been done to them since the last step.
    """

    def __init__(
        self,
        shardings: Mapping[nn.Parameter, ParameterSharding],
        world: Axis,
        communication: Communication,
        at_once: bool,
        shared: bool = False,
    ) -> None:
        self.shardings, self.world, self.communication, self.at_once = shardings, world, communication, at_once
        self._shared = shared
        self._announced_by_others = 0
        self._shown = False
        self.buffers: list[Gradients] = []
        self.state = ReductionState()
        self._losses: list[Tensor] = []
        self._reached_directly: set[nn.Parameter] = set()
        self._overlap = BucketOverlap(world)

    def add(self, buffers: list[Gradients]) -> None:
        """More buffers."""
        self.buffers += buffers
        self._overlap.add(buffers)

    def release(self) -> None:
        """Take the hooks from the parameters."""
        self._overlap.release()

    def zero(self, set_to_none: bool = True) -> None:
        """Begin a step, whatever became of the one before."""
        self._overlap.give_up()
        for gradients in self.buffers:
            gradients.zero(set_to_none)
        self._losses = []
        under_way = self.state.stage if self.state.stage in _IN_BACKWARD else self.state.announced
        self.state = ReductionState(announced=under_way)

    def step_is_over(self) -> None:
        """The gradients have been used, or the step was skipped."""
        self._losses = []
        if not self._shared:
            self.state = ReductionState()

    def _require(self, call: str, *legal: ReductionStage) -> None:
        """Refuse a call out of order.

        Raises:
            RuntimeError: naming the call, what is so, and what is legal.
        """
        if self.state.stage not in legal:
            raise UserRuntimeError(f"{call}: {self.state.stage.said}; legal now: {self.state.stage.legal}")

    def _move_to(self, stage: ReductionStage) -> None:
        self.state = replace(self.state, stage=stage)

    # --- backwards

    def backward_begins(self, loss: Tensor, last: bool, undisturbed: bool) -> None:
        """See a loss before its backward; see :meth:`TiledOptimizer.backward_begins`."""
        if self._shared and self._go_on(loss):
            return
        self._require("backward_begins", ReductionStage.COLLECTING, ReductionStage.SENT)
        self._announced_by_others = 0
        self._losses.append(loss.detach())
        self._look_at(loss)
        if self.communication.overlap and undisturbed and (last or self.at_once):
            self._overlap.backward_begins()
        stage = ReductionStage.IN_LAST_BACKWARD if last else ReductionStage.IN_BACKWARD
        self.state = replace(self.state, stage=stage, announced=None)

    def _go_on(self, loss: Tensor) -> bool:
        """Whether another optimizer has announced this backward. Where nothing was reduced, gradients go on."""
        if self.state.stage in _IN_BACKWARD and self._losses and self._losses[-1].data_ptr() == loss.data_ptr():
            self._announced_by_others += 1
            return True
        if self.state.stage in _COMBINED and all(g.buffer.are_alone for g in self.buffers):
            self.state = ReductionState()
        return False

    def backward_ended(self) -> None:
        """Send what the backward left, if it is to leave at once; collective."""
        if self._announced_by_others:
            self._announced_by_others -= 1
            return
        if self.state.announced is not None:
            self.state = replace(self.state, stage=self.state.announced, announced=None)
        self._require("backward_ended", *_IN_BACKWARD)
        self._overlap.backward_ended()
        if self.at_once:
            with optimizer_pass(self.world):
                self._overlap.send_all()
        if self.state.stage is ReductionStage.IN_LAST_BACKWARD:
            self._move_to(ReductionStage.COMPLETE)
        else:
            self._move_to(ReductionStage.SENT if self.at_once else ReductionStage.COLLECTING)

    def _look_at(self, loss: Tensor) -> None:
        """See which parameters a loss reaches without passing through sequence-sharded activations.

        Raises:
            RuntimeError: one that it reaches both ways.
        """
        if not self.communication.sequence_parallel or self.world.size == 1:
            return
        partial = {
            parameter
            for parameter, sharding in self.shardings.items()
            if sharding.partial_axis.size > 1 and not sharding.declared_partial
        }
        new = partial & reached_directly(loss)
        if not new <= self._reached_directly:
            _, behind = reached(loss)
            if both := new & behind:
                raise UserRuntimeError(
                    f"the loss reaches {', '.join(sorted(self.shardings[p].name for p in both))} both through "
                    "VocabParallelHead and past it: under sequence_parallel=True activations between embedding and "
                    "head are a rank's own part, and nothing but VocabParallelHead and MoE layers may lead from them "
                    "to the loss; legal: compute that term behind the head, or sequence_parallel=False"
                )
        self._reached_directly |= new

    # --- combined

    def combine(self, whole: bool = False) -> None:
        """Combine gradients over replicas, once per step; collective.

        Args:
            whole: make every ``.grad`` the combined gradient, not only this rank's shard of it.
        """
        if self.state.stage in _COMBINED:
            return
        self._require("combining the gradients", *_NOT_COMBINED)
        with optimizer_pass(self.world):
            if not self.at_once or self.state.stage is ReductionStage.COLLECTING:
                self._overlap.send_all()
            elif any(gradients.waiting for gradients in self.buffers):
                raise UserRuntimeError(
                    "a backward added gradients after zero_stage=2 had reduced those of this step: legal in manual "
                    "optimization: self.manual_backward(loss) for every backward of a step, or for none"
                )
            for gradients in self.buffers:
                gradients.combine(whole, self._reached_directly)
                self._shown = whole
                if self._shared:
                    gradients.settle()
        self._move_to(ReductionStage.COMBINED)

    def unscale(self, factor: float | Tensor) -> None:
        """Take the loss scale out of the combined gradients, once per step; collective."""
        self._require("unscale", *_NOT_COMBINED, ReductionStage.COMBINED)
        self.combine()
        self._scale(factor)
        self._move_to(ReductionStage.UNSCALED)

    def _scale(self, factor: float | Tensor) -> None:
        """Multiply all gradients: done on the way through the step."""
        self.state = replace(self.state, scale=self.state.scale * factor)

    def norm(self) -> Tensor:
        """The 2-norm of all gradients: an fp64 scalar; collective."""
        return self._measured_norm() * self.state.scale

    @property
    def losses(self) -> list[Tensor]:
        """This rank's losses of the step."""
        return self._losses

    def finite(self) -> Tensor:
        """Whether no gradient and no loss of any rank is infinite or NaN: a scalar on their device; collective.

        Copies of gradients that the norm does not count are included.
        """
        if self.state.finite is None:
            self._measure(exact=self.host_waits)  # by which a device takes no longer
        assert self.state.finite is not None
        return self.state.finite

    def losses_finite(self) -> Tensor:
        """Whether no loss of any rank is infinite or NaN: a scalar on their device; collective."""
        self.finite()
        assert self.state.losses_finite is not None
        return self.state.losses_finite

    @property
    def host_waits(self) -> bool:
        """Whether to look at a value would keep the host waiting for a device."""
        return device_type(next(iter(self.shardings))) != "cpu"

    def _measured_norm(self) -> Tensor:
        """The norm before :attr:`ReductionState.scale`."""
        self.combine()
        if self.state.norm is None:
            self._measure(exact=True)
        assert self.state.norm is not None
        return self.state.norm

    def _measure(self, exact: bool) -> None:
        """Take the norm, unless that is not asked for exactly, and whether it is finite."""
        self.combine()
        device = next(iter(self.shardings)).device
        sums = square_sums(self.buffers, device, exact)  # of what is counted, and of everything
        own = sums.new_zeros(1)
        for loss in self._losses:  # without a collective of its own: 0 where it is finite, else NaN
            own += (loss * 0).sum()
        with optimizer_pass(self.world):
            counted, everything, losses = collectives.all_reduce(torch.cat([sums, own]), self.world)
        self.state = replace(self.state, norm=counted.sqrt() if exact else None)
        if self.state.finite is None:
            self.state = replace(self.state, finite=(everything + losses).isfinite(), losses_finite=losses.isfinite())

    def clip_by_norm(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their norm is at most ``max_norm``. Returns the norm before; collective."""
        norm = self.norm()
        self.scale_to(norm, max_norm)
        return norm

    def scale_to(self, norm: Tensor, max_norm: float) -> None:
        """Scale all gradients by what brings a norm down to ``max_norm``, if it is larger.

        Where somebody looks at them this is done at once, unless a loss scale without which fp16 would lose them is
        still in them.
        """
        if self.host_waits:
            self._scale((max_norm / (norm + 1e-6)).clamp(max=1.0))
        else:
            factor = max_norm / (float(norm) + 1e-6)
            if not factor >= 1:  # NaN as well, which torch spreads, too
                self._scale(factor)
        if self._shown and self.state.stage is not ReductionStage.UNSCALED:
            self.scale_in_place()

    def scale_in_place(self) -> None:
        """Multiply the combined gradients by what they are still to be multiplied by."""
        norm = None if self.state.norm is None else self.state.norm * self.state.scale
        for gradients in self.buffers:
            gradients.multiply(self.state.scale)
        self.state = replace(self.state, scale=1.0, norm=norm)

    def clip_by_value(self, max_value: float) -> None:
        """Clamp every gradient element to [-max_value, max_value]; collective."""
        self.finite()  # known from before: clamped, an infinity would look like a gradient
        scale = self.state.scale
        if isinstance(scale, Tensor) or scale:  # 0 where an infinite norm was clipped: everything is 0 or NaN then
            for gradients in self.buffers:
                gradients.clamp(max_value / scale)
        self.state = replace(self.state, norm=None)

    def culprit(self) -> str:
        """A parameter with a gradient that is not finite, and the rank that owns it; collective."""
        names = sorted({sharding.name for sharding in self.shardings.values()})
        bad = (entry for gradients in self.buffers if (entry := gradients.bad_entry()) is not None)
        own = next((names.index(entry.sharding.name) for entry in bad), -1)
        device = next(iter(self.shardings)).device
        by_rank = collectives.all_gather(torch.tensor([own], device=device), 0, self.world).tolist()
        rank = next((rank for rank, index in enumerate(by_rank) if index >= 0), None)
        return UNKNOWN if rank is None else f"{names[by_rank[rank]]} (rank {rank})"
