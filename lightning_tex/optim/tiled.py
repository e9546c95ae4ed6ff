"""The sharded, tiled optimizer that the strategy puts in the place of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tex import collectives
from lightning_tex.optim.engine import Engine
from lightning_tex.optim.flat import FlatBuffer, Member, buckets, kind
from lightning_tex.optim.overlap import Overlap
from lightning_tex.optim.rounding import Dice
from lightning_tex.optim.shard import Piece, Shard
from lightning_tex.optim.storage import Storage
from lightning_tex.placement import Placement
from lightning_tex.stream import reached, reached_directly
from lightning_tex.topology import Axis, Communication


@dataclass
class Pending:
    """What has been done to the gradients since the last step.

    An object of its own, because Lightning's wrapper forwards reads to the optimizer but keeps what is assigned.

    left: they left in each backward (ZeRO 2). reduced: combined over replicas. scale: to be scaled by this. norm: their
    norm before that, if it is known. finite: whether it was.
    """

    left: bool = False
    reduced: bool = False
    scale: float = 1.0
    norm: Tensor | None = None
    finite: bool | None = None

    def clear(self) -> None:
        self.left, self.reduced, self.scale, self.norm, self.finite = False, False, 1.0, None, None


@dataclass
class Skipped:
    """Steps not taken because a gradient was infinite or NaN: since training was set up, and the last ones in a row."""

    total: int = 0
    in_a_row: int = 0


class TiledOptimizer(Optimizer):
    """An elementwise torch optimizer, with its states sharded over replicas and stepped tile by tile.

    Non-expert states are sharded over the data axis, expert states over expert_data (paper section 2). Group dicts
    are those of the user's optimizer, so schedulers and whoever reads learning rates act on what is used. A parameter
    without gradient counts as one with gradient zero.

    Args:
        optimizer: the user's optimizer over the cut model's parameters.
        placements: parameter -> placement.
        world: all ranks, over which norms are summed.
        storage: what is kept, in which form and where; ``None``: the defaults.
        communication: what is done to communicate less; ``None``: the defaults.

    Raises:
        ValueError: the optimizer is not elementwise, or holds a parameter that is not the model's.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        placements: dict[nn.Parameter, Placement],
        world: Axis,
        storage: Storage | None = None,
        communication: Communication | None = None,
    ) -> None:
        # Monitors and messages name an optimizer by its class: let it go by the user's.
        self.__class__ = type(type(optimizer).__name__, (TiledOptimizer,), {})
        self.inner, self.world, self.placements = optimizer, world, placements
        self.storage = storage or Storage()
        self.dice = Dice(self.storage.seed)
        self.engine = Engine(optimizer)
        self.shards: list[Shard] = []
        self.frozen: list[nn.Parameter] = []
        self.pending, self.skipped = Pending(), Skipped()
        self.communication = communication or Communication()
        self.direct: set[nn.Parameter] = set()
        self._overlap = self._new_overlap()
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups = optimizer.param_groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as ``torch.optim.Optimizer`` does, and lay its parameters out in buffers."""
        known = any(param_group is group for group in self.inner.param_groups)
        if not known:
            self.inner.add_param_group(param_group)
            param_group = self.inner.param_groups[-1]
        else:
            self.param_groups.append(param_group)
        kinds: dict[tuple[object, ...], list[Member]] = {}
        for parameter in param_group["params"]:
            placement = self.placements.get(parameter)
            if placement is None:
                raise ValueError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not a parameter of the "
                    "LightningModule; register it there, so that it is placed and saved"
                )
            if not parameter.requires_grad:
                self.frozen.append(parameter)
            else:
                kinds.setdefault(kind(parameter, placement), []).append((parameter, placement))
        states = self.storage.for_group(self.inner, param_group, self.dice)
        for members in kinds.values():
            for bucket in buckets(members):
                buffer = FlatBuffer(bucket, sharded=self.storage.zero_stage > 0)
                self.shards.append(Shard(buffer, self.storage.gradients(buffer), states(buffer), param_group))
        self._overlap.release()
        self._overlap = self._new_overlap()

    def _new_overlap(self) -> Overlap:
        gradients = [shard.gradients for shard in self.shards]
        return Overlap(gradients, self.world, self._counted, lambda parameter: self.placements[parameter].name)

    # --- gradients

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients. ``.grad`` stays a view of flat buffers (or ``None``, ZeRO 2), whatever is asked for."""
        for shard in self.shards:
            shard.gradients.zero()
        self.pending.clear()

    def reduce_gradients(self, whole: bool = False) -> None:
        """Combine gradients over replicas, once per step; collective.

        Args:
            whole: make every ``.grad`` the combined gradient, not only this rank's shard of it.
        """
        if self.pending.reduced:
            return
        self._require_frozen()
        with self._counted():
            if not self.pending.left:
                self._send()
            elif any(shard.gradients.waiting for shard in self.shards):
                raise RuntimeError(
                    "a backward added gradients after zero_stage=2 had reduced those of this step: legal in manual "
                    "optimization: self.manual_backward(loss) for every backward of a step, or for none"
                )
            for shard in self.shards:
                shard.gradients.combine(whole, self.direct)
        self.pending.reduced = True

    def _send(self) -> None:
        self._overlap.start_all()
        self._overlap.finish_all()

    def overlapping(self) -> AbstractContextManager[None]:
        """Inside runs the step's only or last backward: gradients leave for their owners as they are completed."""
        return self._overlap.during() if self._overlaps and not self.leaves_in_each_backward else nullcontext()

    @property
    def leaves_in_each_backward(self) -> bool:
        """Whether gradients are reduced in every micro-batch (ZeRO 2), not only in the last of a step."""
        return self.storage.zero_stage == 2

    @property
    def _overlaps(self) -> bool:
        return self.communication.overlap

    def before_backward(self, loss: Tensor, undisturbed: bool) -> None:
        """See a loss before its backward.

        Args:
            loss: what the backward begins with.
            undisturbed: the backward is one, and nothing looks at gradients before they are reduced.
        """
        self._look_at(loss)
        if self.leaves_in_each_backward and self._overlaps and undisturbed:
            self._overlap.begin()

    def after_backward(self) -> None:
        """Send what the backward left, if it is to leave at once; collective."""
        if self.leaves_in_each_backward:
            with self._counted():
                self._send()
            self.pending.left = True

    def _look_at(self, loss: Tensor) -> None:
        """See which parameters a loss reaches without passing through the stream that sequence parallelism splits.

        Raises:
            RuntimeError: one that it reaches both ways.
        """
        if not self.communication.sequence_parallel or self.world.size == 1:
            return
        split = {parameter for parameter, placement in self.placements.items() if placement.parts.size > 1}
        new = split & reached_directly(loss)
        if not new <= self.direct:
            _, behind = reached(loss)
            if both := new & behind:
                raise RuntimeError(
                    f"the loss reaches {', '.join(sorted(self.placements[p].name for p in both))} both through "
                    "VocabParallelHead and past it: under sequence_parallel=True activations between embedding and "
                    "head are a rank's own part, and nothing but VocabParallelHead and MoE layers may lead from them "
                    "to the loss; legal: compute that term behind the head, or sequence_parallel=False"
                )
        self.direct |= new

    def release(self) -> None:
        """Let go of the parameters: nothing of this optimizer acts on them any more."""
        self._overlap.release()

    def _require_frozen(self) -> None:
        for parameter in self.frozen:
            if parameter.requires_grad:
                raise RuntimeError(
                    f"{self.placements[parameter].name} was frozen when training was set up and is not any more, but "
                    "the optimizer has no state for it; leave it out of the optimizer while it is frozen and add it "
                    "with optimizer.add_param_group (as Lightning's BaseFinetuning does)"
                )

    def gradient_norm(self) -> Tensor:
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
        self.reduce_gradients()
        if self.pending.norm is not None:
            return
        device = next(iter(self.placements)).device
        total = torch.zeros(2, dtype=torch.float64, device=device)  # of what is counted, and of everything
        for shard in self.shards:
            square = shard.gradients.squared_norm()
            total += square if shard.buffer.counted else torch.stack([torch.zeros_like(square), square])
        with self._counted():
            counted, everything = collectives.all_reduce(total, self.world)
        self.pending.norm = counted.sqrt()
        if self.pending.finite is None:
            self.pending.finite = bool(torch.isfinite(everything))

    def scale_gradients(self, factor: float) -> None:
        """Multiply all gradients; done on the way through the step."""
        self.pending.scale *= factor

    def clip_by_norm(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their norm is at most ``max_norm``. Returns the norm before; collective."""
        norm = self.gradient_norm()
        if self.finite():
            self.scale_gradients(min(1.0, max_norm / (float(norm) + 1e-6)))
        return norm

    def clip_by_value(self, max_value: float) -> None:
        """Clamp every gradient element to [-max_value, max_value]; collective."""
        if self.finite():  # clamped, an infinity would look like a gradient
            for shard in self.shards:
                shard.gradients.clamp(max_value / self.pending.scale)
            self.pending.norm = None

    def _counted(self) -> AbstractContextManager[None]:
        """What is sent inside counts as the optimizer's."""
        return nullcontext() if self.world.meter is None else self.world.meter.optimizer_pass()

    # --- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Combine gradients if that has not happened, update the own shards, gather the parameters; collective."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self.reduce_gradients()
        if self.storage.guard is not None and not self.finite():
            self.skip()
            return result
        self.skipped.in_a_row = 0
        under_way = []
        for shard in self.shards:
            shard.step(self.engine, self.pending.scale)
            with self._counted():
                under_way.append(shard.buffer.gather())
        for gathering in under_way:
            gathering.wait()
        self.dice.step += 1
        self._step_is_over()
        return result

    def _step_is_over(self) -> None:
        self.pending.clear()
        # Schedulers look here, to warn about being stepped before the optimizer.
        self.inner._opt_called = self._opt_called = True  # type: ignore[attr-defined]

    def skip(self) -> None:
        """Do nothing instead of a step.

        Raises:
            RuntimeError: the last steps have all been skipped, as many as the storage's guard says.
        """
        most = self.storage.guard
        self.skipped.total += 1
        self.skipped.in_a_row += 1
        self._step_is_over()
        if most is not None and self.skipped.in_a_row >= most:
            raise RuntimeError(
                f"the gradient of {self._culprit()} is infinite or NaN, and some gradient was in each of the last "
                f"{most} steps, none of which was taken; look at the data and the learning rate of the steps before. "
                "Legal: TexMoEStrategy(max_skipped_steps=..), None to take such steps"
            )

    def _culprit(self) -> str:
        """A parameter with a gradient that is not finite, and the rank that owns it; collective."""
        names = sorted({placement.name for placement in self.placements.values()})
        bad = (entry for shard in self.shards if (entry := shard.gradients.bad_entry()) is not None)
        own = next((names.index(entry.placement.name) for entry in bad), -1)
        device = next(iter(self.placements)).device
        found = collectives.all_gather(torch.tensor([own], device=device), 0, self.world).tolist()
        rank = next((rank for rank, index in enumerate(found) if index >= 0), None)
        return "some parameter" if rank is None else f"{names[found[rank]]} (rank {rank})"

    def refresh(self) -> None:
        """Take up parameters that were written from outside since the last step."""
        for shard in self.shards:
            shard.refresh()

    def keep_states(self) -> None:
        """Hold the own shards' states for newer than the parameters; collective."""
        for shard in self.shards:
            shard.keep()
            shard.buffer.gather().wait()

    # --- state, in pieces

    def pieces(self) -> Iterator[Piece]:
        """Every piece of every parameter that this rank's windows hold."""
        for shard in self.shards:
            yield from shard.pieces()


# Schedulers are told of our step as they are of one they wrapped themselves.
TiledOptimizer.step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def parameter_names(groups: Iterable[dict[str, Any]], placements: dict[nn.Parameter, Placement]) -> list[list[str]]:
    """Names of each group's parameters, in their order."""
    return [[placements[p].name for p in group["params"]] for group in groups]
