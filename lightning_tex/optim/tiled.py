"""The sharded, tiled optimizer that the strategy puts in the place of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tex.errors import UserRuntimeError, UserValueError
from lightning_tex.optim.engine import Engine
from lightning_tex.optim.flat import FlatBuffer, Member, buckets, kind
from lightning_tex.optim.gradient_reducer import GradientReducer
from lightning_tex.optim.rounding import RoundingSeed
from lightning_tex.optim.shard import Piece, Shard
from lightning_tex.optim.state_config import OptimizerStateConfig
from lightning_tex.parallel.sharding import ParameterSharding
from lightning_tex.parallel.topology import Axis, Communication


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
        optimizer: the user's optimizer over the sharded model's parameters.
        shardings: parameter -> sharding.
        world: all ranks, over which norms are summed.
        state_config: what is kept, in which form and where; ``None``: the defaults.
        communication: what is done to communicate less; ``None``: the defaults.

    Raises:
        ValueError: the optimizer is not elementwise, or holds a parameter that is not the model's.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        shardings: dict[nn.Parameter, ParameterSharding],
        world: Axis,
        state_config: OptimizerStateConfig | None = None,
        communication: Communication | None = None,
    ) -> None:
        # Monitors and messages name an optimizer by its class: let it go by the user's.
        self.__class__ = type(type(optimizer).__name__, (TiledOptimizer,), {})
        self.inner, self.world, self.shardings = optimizer, world, shardings
        self.state_config = state_config or OptimizerStateConfig()
        self.rounding_seed = RoundingSeed(self.state_config.seed)
        self.engine = Engine(optimizer)
        self.shards: list[Shard] = []
        self.frozen: list[nn.Parameter] = []
        self.skipped = Skipped()
        self.reducer = GradientReducer(
            shardings, world, communication or Communication(), self.state_config.zero_stage == 2
        )
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups = optimizer.param_groups
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            setattr(self, hooks, getattr(optimizer, hooks))

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
            sharding = self.shardings.get(parameter)
            if sharding is None:
                raise UserValueError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not a parameter of the "
                    "LightningModule; register it there, so that it is placed and saved"
                )
            if not parameter.requires_grad:
                self.frozen.append(parameter)
            else:
                kinds.setdefault(kind(parameter, sharding), []).append((parameter, sharding))
        states = self.state_config.for_group(self.inner, param_group, self.rounding_seed)
        new = []
        for members in kinds.values():
            for bucket in buckets(members):
                buffer = FlatBuffer(bucket, sharded=self.state_config.zero_stage > 0)
                new.append(Shard(buffer, self.state_config.gradients(buffer), states(buffer), param_group))
        self.shards += new
        self.reducer.add([shard.gradients for shard in new])

    # --- gradients

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients. ``.grad`` stays a view of flat buffers (or ``None``, ZeRO 2), whatever is asked for."""
        self.reducer.zero()

    def reduce_gradients(self, whole: bool = False) -> None:
        """Combine gradients over replicas, once per step; collective.

        Args:
            whole: make every ``.grad`` the combined gradient, not only this rank's shard of it.
        """
        self._require_frozen()
        self.reducer.reduce(whole)

    def gradient_norm(self) -> Tensor:
        """The 2-norm of all gradients, each parameter counted once, whatever the layout: an fp64 scalar; collective."""
        return self.reducer.norm()

    def clip_by_norm(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their norm is at most ``max_norm``. Returns the norm before; collective."""
        return self.reducer.clip_by_norm(max_norm)

    def clip_by_value(self, max_value: float) -> None:
        """Clamp every gradient element to [-max_value, max_value]; collective."""
        self.reducer.clip_by_value(max_value)

    def release(self) -> None:
        """Let go of the parameters: nothing of this optimizer acts on them any more."""
        self.reducer.release()

    def _require_frozen(self) -> None:
        for parameter in self.frozen:
            if parameter.requires_grad:
                raise UserRuntimeError(
                    f"{self.shardings[parameter].name} was frozen when training was set up and is not any more, but "
                    "the optimizer has no state for it; leave it out of the optimizer while it is frozen and add it "
                    "with optimizer.add_param_group (as Lightning's BaseFinetuning does)"
                )

    # --- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Combine gradients if that has not happened, update the own shards, gather the parameters; collective."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self.reduce_gradients()
        if self.state_config.max_skipped_steps is not None and not self.reducer.finite():
            self.skip()
            return result
        self.skipped.in_a_row = 0
        under_way = []
        for shard in self.shards:
            shard.step(self.engine, self.reducer.pending.scale)
            with self.reducer.counted():
                under_way.append(shard.buffer.gather())
        for gathering in under_way:
            gathering.wait()
        self.rounding_seed.step += 1
        self._step_is_over()
        return result

    def _step_is_over(self) -> None:
        self.reducer.pending.clear()
        # Schedulers look here, to warn about being stepped before the optimizer.
        self.inner._opt_called = self._opt_called = True  # type: ignore[attr-defined]

    def skip(self) -> None:
        """Do nothing instead of a step.

        Raises:
            RuntimeError: the last steps have all been skipped, as many as the storage's guard says.
        """
        most = self.state_config.max_skipped_steps
        self.skipped.total += 1
        self.skipped.in_a_row += 1
        self._step_is_over()
        if most is not None and self.skipped.in_a_row >= most:
            raise UserRuntimeError(
                f"the gradient of {self.reducer.culprit()} is infinite or NaN, and some gradient was in each of "
                f"the last {most} steps, none of which was taken; look at the data and the learning rate of the steps "
                "before. Legal: TexMoEStrategy(max_skipped_steps=..), None to take such steps"
            )

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

    def state_dict(self) -> dict[str, Any]:
        """Refused: this rank has a part of the states, and a checkpoint has them all.

        Raises:
            RuntimeError: always, saying what to call.
        """
        raise UserRuntimeError(
            "the states of this optimizer are sharded over ranks; trainer.save_checkpoint(..) saves all of them, and "
            "TexMoEStrategy(save_distributed_checkpoint=False) in torch's own form"
        )

    def load_state_dict(self, state_dict: Any) -> None:
        """Refused, as :meth:`state_dict` is.

        Raises:
            RuntimeError: always, saying what to call.
        """
        raise UserRuntimeError("the states of this optimizer are sharded over ranks; give the Trainer a ckpt_path")

    def pieces(self) -> Iterator[Piece]:
        """Every piece of every parameter that this rank's windows hold."""
        for shard in self.shards:
            yield from shard.pieces()


# Schedulers are told of our step as they are of one they wrapped themselves.
TiledOptimizer.step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def parameter_names(
    groups: Iterable[dict[str, Any]], shardings: dict[nn.Parameter, ParameterSharding]
) -> list[list[str]]:
    """Names of each group's parameters, in their order."""
    return [[shardings[p].name for p in group["params"]] for group in groups]
