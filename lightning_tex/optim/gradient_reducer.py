"""From backwards to the gradients of a step: when they leave, what is combined, what scales and bounds them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_tex.errors import UserRuntimeError
from lightning_tex.optim.gradients import Gradients
from lightning_tex.optim.overlap import BucketOverlap
from lightning_tex.parallel import collectives
from lightning_tex.parallel.activation_layout import reached, reached_directly
from lightning_tex.parallel.sharding import ParameterSharding
from lightning_tex.parallel.topology import Axis, Communication


@dataclass
class ReductionState:
    """What has been done to the gradients since the last step.

    An object of its own, because Lightning's wrapper forwards reads to the optimizer but keeps what is assigned.

    left: they left in each backward (ZeRO 2). reduced: combined over replicas. scale: to be scaled by this. norm: their
    norm before that, if it is known. finite: whether it was. unscaled: that takes a loss scale out.
    """

    left: bool = False
    reduced: bool = False
    scale: float = 1.0
    norm: Tensor | None = None
    finite: bool | None = None
    unscaled: bool = False

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]


class GradientReducer:
    """The gradients of all buffers, from their backwards to the step.

    Args:
        shardings: parameter -> sharding.
        world: all ranks, over which norms are summed.
        communication: what is done to communicate less.
        at_once: they are reduced in every backward (ZeRO 2), not only in the last of a step.
    """

    def __init__(
        self,
        shardings: Mapping[nn.Parameter, ParameterSharding],
        world: Axis,
        communication: Communication,
        at_once: bool,
    ) -> None:
        self.shardings, self.world, self.communication, self.at_once = shardings, world, communication, at_once
        self.gradients: list[Gradients] = []
        self.pending = ReductionState()
        self.direct: set[nn.Parameter] = set()
        self._overlap = self._new_overlap()

    def add(self, gradients: list[Gradients]) -> None:
        """More buffers."""
        self.gradients += gradients
        self.release()
        self._overlap = self._new_overlap()

    def _new_overlap(self) -> BucketOverlap:
        return BucketOverlap(self.gradients, self.world, self.counted, lambda parameter: self.shardings[parameter].name)

    def release(self) -> None:
        """Take the hooks from the parameters."""
        self._overlap.release()

    def counted(self) -> AbstractContextManager[None]:
        """What is sent inside counts as the optimizer's."""
        return nullcontext() if self.world.meter is None else self.world.meter.optimizer_pass()

    def zero(self) -> None:
        """Begin a step."""
        for each in self.gradients:
            each.zero()
        self.pending.clear()

    # --- backwards

    def overlapping(self) -> AbstractContextManager[None]:
        """Inside runs the step's only or last backward: gradients leave for their owners as they are completed."""
        return self._overlap.during() if self.communication.overlap and not self.at_once else nullcontext()

    def before_backward(self, loss: Tensor, undisturbed: bool) -> None:
        """See a loss before its backward.

        Args:
            loss: what the backward begins with.
            undisturbed: the backward is one, and nothing looks at gradients before they are reduced.
        """
        self._look_at(loss)
        if self.at_once and self.communication.overlap and undisturbed:
            self._overlap.begin()

    def after_backward(self) -> None:
        """Send what the backward left, if it is to leave at once; collective."""
        if self.at_once:
            with self.counted():
                self._send()
            self.pending.left = True

    def _look_at(self, loss: Tensor) -> None:
        """See which parameters a loss reaches without passing through the stream that sequence parallelism splits.

        Raises:
            RuntimeError: one that it reaches both ways.
        """
        if not self.communication.sequence_parallel or self.world.size == 1:
            return
        split = {parameter for parameter, sharding in self.shardings.items() if sharding.partial_axis.size > 1}
        new = split & reached_directly(loss)
        if not new <= self.direct:
            _, behind = reached(loss)
            if both := new & behind:
                raise UserRuntimeError(
                    f"the loss reaches {', '.join(sorted(self.shardings[p].name for p in both))} both through "
                    "VocabParallelHead and past it: under sequence_parallel=True activations between embedding and "
                    "head are a rank's own part, and nothing but VocabParallelHead and MoE layers may lead from them "
                    "to the loss; legal: compute that term behind the head, or sequence_parallel=False"
                )
        self.direct |= new

    # --- combined

    def reduce(self, whole: bool = False) -> None:
        """Combine gradients over replicas, once per step; collective.

        Args:
            whole: make every ``.grad`` the combined gradient, not only this rank's shard of it.
        """
        if self.pending.reduced:
            return
        with self.counted():
            if not self.pending.left:
                self._send()
            elif any(each.waiting for each in self.gradients):
                raise UserRuntimeError(
                    "a backward added gradients after zero_stage=2 had reduced those of this step: legal in manual "
                    "optimization: self.manual_backward(loss) for every backward of a step, or for none"
                )
            for each in self.gradients:
                each.combine(whole, self.direct)
        self.pending.reduced = True

    def _send(self) -> None:
        self._overlap.start_all()
        self._overlap.finish_all()

    def norm(self) -> Tensor:
        """The 2-norm of all gradients, each parameter counted once, whatever the layout: an fp64 scalar; collective."""
        self._measure()
        assert self.pending.norm is not None
        return self.pending.norm * self.pending.scale

    def finite(self) -> bool:
        """Whether no gradient anywhere is infinite or NaN, copies that the norm does not count included; collective."""
        if self.pending.finite is None:
            self._measure()
        return bool(self.pending.finite)

    def _measure(self) -> None:
        self.reduce()
        if self.pending.norm is not None:
            return
        device = next(iter(self.shardings)).device
        total = torch.zeros(2, dtype=torch.float64, device=device)  # of what is counted, and of everything
        for each in self.gradients:
            square = each.squared_norm()
            total += square if each.buffer.counted else torch.stack([torch.zeros_like(square), square])
        with self.counted():
            counted, everything = collectives.all_reduce(total, self.world)
        self.pending.norm = counted.sqrt()
        if self.pending.finite is None:
            self.pending.finite = bool(torch.isfinite(everything))

    def scale(self, factor: float) -> None:
        """Multiply all gradients; done on the way through the step."""
        self.pending.scale *= factor

    def clip_by_norm(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their norm is at most ``max_norm``. Returns the norm before; collective."""
        norm = self.norm()
        factor = max_norm / (float(norm) + 1e-6)
        if not factor >= 1:  # NaN as well, which torch spreads, too
            self.scale(factor)
        return norm

    def clip_by_value(self, max_value: float) -> None:
        """Clamp every gradient element to [-max_value, max_value]; collective."""
        self.finite()  # known from before: clamped, an infinity would look like a gradient
        if self.pending.scale:  # 0 where an infinite norm was clipped: everything is 0 or NaN then
            for each in self.gradients:
                each.clamp(max_value / self.pending.scale)
        self.pending.norm = None

    def culprit(self) -> str:
        """A parameter with a gradient that is not finite, and the rank that owns it; collective."""
        names = sorted({sharding.name for sharding in self.shardings.values()})
        bad = (entry for each in self.gradients if (entry := each.bad_entry()) is not None)
        own = next((names.index(entry.sharding.name) for entry in bad), -1)
        device = next(iter(self.shardings)).device
        found = collectives.all_gather(torch.tensor([own], device=device), 0, self.world).tolist()
        rank = next((rank for rank, index in enumerate(found) if index >= 0), None)
        return "some parameter" if rank is None else f"{names[found[rank]]} (rank {rank})"
