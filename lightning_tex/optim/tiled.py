"""The tiled optimizer (paper, section 4), which the strategy puts in the place of the user's.

How one step is tiled, from the whole to the tile:

- :class:`TiledOptimizer` (here) has one :class:`~lightning_tex.optim.shard.Shard` for every flat buffer of parameters
  (``flat.py``): the part of it that this rank owns. A step walks the tiles of all shards, many small ones at once
  (``batches`` in ``shard.py``), by what was decided of it (``walk.py``). Groups of an optimizer that needs whole
  matrices are stepped otherwise (``matrices``): ``stepping.py`` decides.
- The tiles are ``StateFormat.spans`` (``formats.py``), windows of ``tile_size`` consecutive elements that cut through
  parameters; ``StateFormat.window`` puts one together and takes it apart: in place (``PlainStates``), or from what
  less is kept (``compact.py``, ``moments.py``).
- ``Engine.step_windows`` (``engine.py``) upcasts gradients, scales and runs the user's own ``step`` on some of them;
  ``probe.py`` has tried first whether it may, and how many temporary bytes an element costs.
- ``OptimizerStateConfig.tiled_states`` (``state_config.py``) decides: format and size of the tiles, from the user's
  ``tile_size`` or the budget of ``flat_sizes.py``. An option of the tile begins there, is handed to a ``StateFormat``
  and is an argument of :class:`~lightning_tex.TexMoEStrategy`.

What becomes of gradients before that is in ``gradient_reducer.py`` (order and state of a step, ``reduction_stage.py``),
``gradients.py`` (what ZeRO keeps of them) and ``overlap.py`` (when they leave). Stepped parameters come back by
``forward_overlap.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tex.optim.closure import loss_of
from lightning_tex.optim.combined import stepper_of
from lightning_tex.optim.overlap import optimizer_pass
from lightning_tex.optim.reduction_stage import ReductionStage
from lightning_tex.optim.rounding import RoundingSeed
from lightning_tex.optim.run_buffers import RunBuffers
from lightning_tex.optim.shard import Piece, Shard, by_kind, regroup
from lightning_tex.optim.skipping import Skipped, StepGuard
from lightning_tex.optim.stand_in import StandIn
from lightning_tex.optim.state_config import OptimizerStateConfig
from lightning_tex.optim.stepping import Stepping, stepping
from lightning_tex.optim.walk import Walk
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.layout import Communication
from lightning_tex.parallel.sharding import ParameterSharding
from lightning_tex.parallel.topology import Axis


class TiledOptimizer(StandIn):
    """A torch optimizer, with its states sharded over replicas and stepped tile by tile or, where it must be, matrix
    by matrix.

    Non-expert states are sharded over the data axis, expert states over expert_data (paper section 2). Group dicts
    are those of the user's optimizer, so schedulers and whoever reads learning rates act on what is used. A parameter
    without gradient counts as one with gradient zero.

    This is the one door to the gradients of a step, for the strategy's precision plugins as for a loop of one's own:

        optimizer.zero_grad()
        for i, batch in enumerate(batches):             # the micro-batches of a step
            loss = model(batch) / len(batches)
            optimizer.backward_begins(loss)
            loss.backward()
            optimizer.backward_ended()
        optimizer.clip_by_norm(1.0)
        optimizer.step()

    A call out of this order is an error that says what is legal.

    Args:
        optimizer: the user's optimizer over the sharded model's parameters.
        shardings: parameter -> sharding.
        world: all ranks, over which norms are summed.
        state_config: what is kept, in which form and where; ``None``: the defaults.
        communication: what is done to communicate less; ``None``: the defaults.
        rounding_seed: one that other optimizers of the run share; ``None``: its own, of the configuration's seed.
        buffers: of a run that has other optimizers, too, in place of ``shardings``, ``world``, ..; ``None``: its own.

    Attributes:
        guard: counts steps that are not taken, and tells its watcher.

    Raises:
        ValueError: the optimizer's update of a matrix depends on others, or it holds a parameter that is not the
            model's.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        shardings: dict[nn.Parameter, ParameterSharding],
        world: Axis,
        state_config: OptimizerStateConfig | None = None,
        communication: Communication | None = None,
        rounding_seed: RoundingSeed | None = None,
        buffers: RunBuffers | None = None,
    ) -> None:
        self.world, self.shardings = world, shardings
        self.buffers = buffers or RunBuffers([optimizer], shardings, world, state_config, communication)
        self.state_config = self.buffers.state_config
        self.rounding_seed = rounding_seed or RoundingSeed(self.state_config.seed)
        self.shards: list[Shard] = []
        self.frozen: list[nn.Parameter] = []
        self._steppings: dict[int, Stepping] = {}
        self.guard = StepGuard(self.state_config.max_skipped_steps, self.culprit)
        self._reducer = self.buffers.reducer(optimizer)
        super().__init__(optimizer)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as ``torch.optim.Optimizer`` does, and lay its parameters out in buffers."""
        known = any(param_group is group for group in self.inner.param_groups)
        if not known:
            self.inner.add_param_group(param_group)
            param_group = self.inner.param_groups[-1]
        else:
            self.param_groups.append(param_group)
        for parameter in param_group["params"]:
            if parameter not in self.shardings:
                raise UserValueError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not a parameter of the "
                    "LightningModule; register it there, so that it is sharded and saved"
                )
        self._stepping_of(param_group)
        self.frozen += [parameter for parameter in param_group["params"] if not parameter.requires_grad]
        self._lay_out(param_group, [parameter for parameter in param_group["params"] if parameter.requires_grad])

    def _stepping_of(self, group: dict[str, Any]) -> Stepping:
        if id(group) not in self._steppings:
            own = stepper_of(self.inner, group)
            self._steppings[id(group)] = stepping(self.state_config, own, group, self.rounding_seed)
        return self._steppings[id(group)]

    def _lay_out(self, group: dict[str, Any], parameters: Sequence[nn.Parameter]) -> None:
        members = [(parameter, self.shardings[parameter]) for parameter in parameters]
        for buffer, gradients in self.buffers.lay_out(self.inner, members):
            self.shards.append(self._stepping_of(group).shard(buffer, gradients))

    def take_up_groups(self) -> None:
        """Take up groups that somebody has put in the place of the optimizer's, as ``BaseFinetuning`` does, and
        parameters that were frozen when they were given to it and are not any more. All parameters are whole then.

        Raises:
            RuntimeError: groups that tear apart what lies in one buffer, or leave some of it out.
        """
        self.wait_for_parameters()
        if self.param_groups is not self.inner.param_groups:
            self._take_up_other_groups()
        if not any(parameter.requires_grad for parameter in self.frozen):
            return
        thawed = {parameter: parameter.grad for parameter in self.frozen if parameter.requires_grad}
        self.frozen = [parameter for parameter in self.frozen if not parameter.requires_grad]
        for group in self.param_groups:
            self._lay_out(group, [parameter for parameter in group["params"] if parameter in thawed])
        for parameter, gradient in thawed.items():
            parameter.grad = gradient

    # --- the gradients of a step

    @property
    def reduction_stage(self) -> ReductionStage:
        """Where the gradients of this step are."""
        return self._reducer.state.stage

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Begin a step, or give one up: zero the gradients.

        ``.grad`` is ``None`` until the next backward, or zero without ``set_to_none`` (not under ZeRO 2).
        """
        if type(self.inner).zero_grad is not Optimizer.zero_grad:  # what the user's class does besides
            self.inner.zero_grad()
        for parameter in self.frozen:
            parameter.grad = None
        self._reducer.zero(set_to_none)

    def backward_begins(self, loss: Tensor, last: bool = False, undisturbed: bool = False) -> None:
        """See a loss before its backward.

        Args:
            loss: what the backward begins with.
            last: no other backward of this step follows.
            undisturbed: the backward is one pass, and nothing looks at gradients before they are combined: they may
                leave for their owners as soon as they are complete, under ZeRO 0 and 1 only in the last one.

        Raises:
            RuntimeError: another backward has not ended, or those of this step are over; a parameter that the loss
                reaches both through a sequence-parallel region and past it.
        """
        self.take_up_groups()
        self._reducer.backward_begins(loss, last, undisturbed)

    def backward_ended(self) -> None:
        """The backward that was begun is over: under ZeRO 2 its gradients leave; collective.

        Raises:
            RuntimeError: none was begun.
        """
        self._reducer.backward_ended()

    def reduce_gradients(self, whole: bool = False) -> None:
        """Combine gradients over replicas, once per step; what needs that (norm, clip, step) calls it. Collective.

        Args:
            whole: make every ``.grad`` the combined gradient, not only this rank's shard of it.

        Raises:
            RuntimeError: a backward has not ended; gradients that would be lost.
        """
        self.take_up_groups()
        self._reducer.combine(whole)

    def unscale(self, factor: float | Tensor) -> None:
        """Multiply the gradients by ``factor``, which takes the loss scale out of them; once per step, collective."""
        self._reducer.unscale(factor)

    def gradient_norm(self) -> Tensor:
        """The 2-norm of all gradients, each parameter counted once, whatever the layout: an fp64 scalar; collective."""
        return self._reducer.norm()

    def gradients_are_finite(self) -> bool:
        """Whether no gradient and no loss of any rank is infinite or NaN, copies included; collective.

        Waits for the device; :meth:`step` does not.
        """
        return bool(self._reducer.finite())

    def infinite(self) -> Tensor:
        """1 where a gradient or loss of any rank is infinite or NaN, else 0: an fp32 scalar; collective."""
        return self._reducer.finite().logical_not().float()

    def losses_are_finite(self) -> Tensor:
        """Whether no loss of any rank is infinite or NaN: a scalar on their device; collective."""
        return self._reducer.losses_finite()

    @property
    def losses(self) -> list[Tensor]:
        """This rank's losses of the step, detached."""
        return self._reducer.losses

    def culprit(self) -> str:
        """A parameter whose combined gradient is not finite, and the rank that owns it; collective."""
        return self._reducer.culprit()

    def leave_out(self) -> None:
        """Take no step with the gradients of this one, which are as they should be; collective."""
        self.reduce_gradients()
        self._step_is_over()

    def clip_by_norm(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their norm is at most ``max_norm``. Returns the norm before; collective."""
        return self._reducer.clip_by_norm(max_norm)

    def clip_by_value(self, max_value: float) -> None:
        """Clamp every gradient element to [-max_value, max_value]; collective."""
        self._reducer.clip_by_value(max_value)

    def release(self) -> None:
        """Let go of the parameters: nothing of this optimizer acts on them any more."""
        self._reducer.release()
        self.buffers.gathering.release()

    def _take_up_other_groups(self) -> None:
        self.inner.param_groups = self.param_groups
        regroup(self.shards, self.param_groups)
        laid_out = {entry.parameter for shard in self.shards for entry in shard.buffer.entries}
        members = (parameter for group in self.param_groups for parameter in group["params"])
        self.frozen = [parameter for parameter in members if parameter not in laid_out]

    # --- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Combine gradients if that has not happened, update the own shards, gather the parameters; collective.

        In a fit, parameters may still be on their way when this returns; an operation on one waits for it.
        """
        result = loss_of(closure)
        self.reduce_gradients()
        try:
            if not self.guard.learn():
                self._step_or_leave_out()
        finally:
            self._step_is_over()
        return result

    def _step_or_leave_out(self) -> None:
        # A loss scale is there to come down where something is infinite.
        guarded = self.state_config.max_skipped_steps is not None or self.reduction_stage is ReductionStage.UNSCALED
        if self._device_decides():
            infinite = self.infinite() if guarded else None
            self._walk(Walk(self._reducer.state.scale, infinite))
            if infinite is not None:
                self.guard.undecided(infinite)
        elif guarded and not self.gradients_are_finite():
            self.guard.left_out()
        else:
            self._walk(Walk(float(self._reducer.state.scale)))
            self.guard.taken()

    def _walk(self, walk: Walk) -> None:
        """Step all shards, and gather the parameters of every shard as soon as it is through; collective."""
        gathering = self.buffers.gathering
        gathering.wait_for_all()
        with optimizer_pass(self.world):
            for alike in by_kind(self.shards):
                for complete in alike[0].step_together(alike, walk):
                    for shard in complete:
                        gathering.start(shard.buffer)
        gathering.step_is_over()
        self.rounding_seed.step += 1

    def wait_for_parameters(self) -> None:
        """Return when all parameters are whole, and no other rank waits for this one's."""
        self.buffers.gathering.wait_for_all()

    def _step_is_over(self) -> None:
        self._reducer.step_is_over()
        self.tell_schedulers()

    # --- steps that are not taken

    @property
    def skipped(self) -> Skipped:
        """Steps that were not taken; waits for the device to have taken the last one or not."""
        return self.guard.all()

    def _device_decides(self) -> bool:
        """Whether a step can be left out without the host's knowing."""
        return self._reducer.host_waits and all(shard.leaves_out for shard in self.shards)

    def refresh(self) -> None:
        """Take up parameters that were written from outside since the last step."""
        self.wait_for_parameters()
        for shard in self.shards:
            shard.refresh()

    def keep_states(self) -> None:
        """Hold the own shards' states for newer than the parameters; collective."""
        self.wait_for_parameters()
        for shard in self.shards:
            shard.keep()
            shard.buffer.gather().wait()

    def pieces(self) -> Iterator[Piece]:
        """Every piece of every parameter that this rank's windows hold."""
        self.wait_for_parameters()
        for shard in self.shards:
            yield from shard.pieces()


# Schedulers are told of our step as they are of one they wrapped themselves.
TiledOptimizer.step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def parameter_names(
    groups: Iterable[dict[str, Any]], shardings: dict[nn.Parameter, ParameterSharding]
) -> list[list[str]]:
    """Names of each group's parameters, in their order."""
    return [[shardings[p].name for p in group["params"]] for group in groups]
