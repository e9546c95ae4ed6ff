"""What is done about a loss that jumps: a word, a step left out, or the newest checkpoint's weights again."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from lightning_tex.optim import TiledOptimizer
from lightning_tex.parallel import collectives
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.resilience.spikes import SpikeDetector, SpikeRule
from lightning_tex.saving import latest
from lightning_tex.strategy.checkpoint_folders import checkpoint_folder

if TYPE_CHECKING:
    from lightning_tex.strategy.checkpointing import CheckpointingStrategy

OnSpike = Literal["warn", "skip", "rewind"] | None
_LEGAL = (None, "warn", "skip", "rewind")


class LossSpikes:
    """Judges the loss of every step on all ranks alike: one all-reduce and one wait for the device, if it is on.

    Args:
        strategy: of the run.
        action: ``None``: nothing is looked at; ``"warn"``: a message; ``"skip"``: and the step is not taken;
            ``"rewind"``: and weights, buffers and optimizer states become those of the newest complete checkpoint.
            Data, step counter and schedulers go on from where they are: the batches since are not seen again.
        rule: when a loss is a spike; ``None``: by the default numbers.

    Raises:
        ValueError: an action that there is not, or a rule without one.
    """

    def __init__(self, strategy: CheckpointingStrategy, action: OnSpike, rule: SpikeRule | None) -> None:
        if action not in _LEGAL:
            raise UserValueError(f"on_spike={action!r}; legal: {', '.join(map(repr, _LEGAL))}")
        if action is None and rule is not None:
            raise UserValueError("spike_rule has no effect with on_spike=None; legal with it: 'warn', 'skip', 'rewind'")
        if action == "rewind" and not strategy.saves_directories:
            raise UserValueError(
                "on_spike='rewind' goes back to a checkpoint directory, and save_distributed_checkpoint=False writes "
                "none; legal: on_spike='skip', or save_distributed_checkpoint=True"
            )
        self._strategy, self._action = strategy, action
        self._detector = SpikeDetector(rule or SpikeRule())
        self._loss: Tensor | None = None
        self._rewinds = False

    def add(self, loss: Tensor) -> None:
        """A micro-batch's share of the step's loss, before its backward."""
        if self._action is not None:
            self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def leaves_out(self, optimizer: TiledOptimizer) -> bool:
        """After the last backward of a step: whether the step is left out, on all ranks; collective."""
        if self._action is None or self._loss is None:
            return False
        world = self._strategy.topology.world
        loss, self._loss = float(collectives.all_reduce(self._loss.double(), world)) / world.size, None
        limit = self._detector.limit()
        if not self._detector.is_spike(loss):
            return False
        assert self._strategy.lightning_module is not None
        step = self._strategy.lightning_module.trainer.global_step + 1
        done = "" if self._action == "warn" else "; the step is not taken"
        self._say(f"the loss of step {step} is a spike: {loss:.4g}, above {limit:.4g}{done}")
        if self._action == "warn":
            return False
        self._rewinds = self._action == "rewind"
        optimizer.leave_out()
        return True

    def step_boundary(self) -> None:
        """Between two batches: go back to the newest checkpoint, if a spike asks for it; collective."""
        if not self._rewinds:
            return
        self._rewinds = False
        strategy, module = self._strategy, self._strategy.lightning_module
        assert module is not None
        strategy.finish_saves()
        folder = checkpoint_folder(module.trainer)
        newest = latest(folder) if folder is not None and strategy.is_global_zero else None
        path = strategy.broadcast(None if newest is None else str(newest))
        if path is None:
            self._say("there is no checkpoint yet to go back to; training goes on from here")
            return
        strategy.load_states(path)
        self._detector.forget()
        self._say(f"weights and optimizer states are those of {path} again; data and schedules go on")

    def _say(self, text: str) -> None:
        if self._strategy.is_global_zero:
            print(f"lightning_tex: {text}", file=sys.stderr, flush=True)
