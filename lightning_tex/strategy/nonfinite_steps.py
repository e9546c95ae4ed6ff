"""Steps that are not taken because something in them is infinite or NaN: what it was, and when that is enough."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_tex.moe.held_experts import HeldExperts
from lightning_tex.optim import TiledOptimizer
from lightning_tex.parallel.errors import UserRuntimeError
from lightning_tex.parallel.sharding import parameter_shardings
from lightning_tex.resilience.finite_watch import FiniteWatch, Seen, of_all_ranks, tensors_in
from lightning_tex.saving import at
from lightning_tex.saving.random_streams import random_streams
from lightning_tex.strategy.checkpoint_folders import checkpoint_folder
from lightning_tex.strategy.nonfinite_reports import RankReport, told
from lightning_tex.strategy.step_dump import DUMPED, KeptBatch, KeptStep, write_dump

if TYPE_CHECKING:
    from lightning_tex.strategy.checkpointing import CheckpointingStrategy

# Steps in a row that may all be over before the first is known not to have been taken, and the next is watched.
_UNWATCHED = 2
# Messages at once, and seconds between further ones.
_SAID_AT_ONCE = 10
_BETWEEN = 30.0


class NonFiniteSteps(UserRuntimeError):
    """So many steps in a row had an infinity or NaN that training ends; raised on all ranks.

    Args:
        said: all of it.
        origin: what was first not finite in the last step.
    """

    def __init__(self, said: str, origin: str = "") -> None:
        super().__init__(said)
        self.origin = origin


@dataclass(frozen=True)
class StepNote:
    """What is to be known of a step, should it turn out not to have been taken.

    Args:
        step: its number, from 1.
        kept: its batches, if it was watched.
        batch_index: of its last batch.
        losses: of this rank, on the device.
        seen: by the watch.
    """

    step: int
    kept: KeptStep
    batch_index: int
    losses: list[Tensor]
    seen: list[Seen]


class SkippedSteps:
    """Says of every skipped step what was not finite, and ends training after so many in a row.

    A healthy step costs nothing. After one that was not, the next ones are watched module by module
    (:class:`~lightning_tex.resilience.finite_watch.FiniteWatch`) until one is taken. On a GPU all of it is a step
    later: whether a step was taken is known when the next one is.

    Args:
        strategy: of the run.
    """

    def __init__(self, strategy: CheckpointingStrategy) -> None:
        self._strategy = strategy
        self._most: int | None = None
        self._optimizers: list[TiledOptimizer] = []
        self._watch: FiniteWatch | None = None
        self._replayed: list[int] = []
        self._kept = KeptStep()
        self._batch_index = 0
        self._step = -1
        self._said, self._unsaid, self._said_last = 0, 0, 0.0
        self._ending: str | None = None
        self._ended_by: StepNote | None = None
        self._origin = ""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_optimizers": [], "_watch": None}

    def replay(self, indices: list[int]) -> None:
        """Watch from the first step on, and say nothing before the end.

        Args:
            indices: of the step's batches in the epoch that they are of.
        """
        self._replayed = indices

    def attend(self, optimizers: Sequence[TiledOptimizer]) -> None:
        """Be told of the steps that optimizers skip because of what is not finite."""
        self._optimizers = list(optimizers)
        self._most = optimizers[0].state_config.max_skipped_steps
        if self._most is not None:
            for optimizer in optimizers:
                optimizer.guard.watcher = _Watcher(self, optimizer)
        self._watch, self._ending = None, None

    # --- in a step

    def batch_begins(self, batch: Any) -> None:
        """Before a training step: keep its batch, if the step is watched or could be the last.

        Args:
            batch: of this rank; kept as it is.
        """
        if self._most is None or not self._optimizers:
            return
        loop = self._strategy.lightning_module.trainer.fit_loop  # type: ignore[union-attr]
        index, step = loop.batch_idx, loop.epoch_loop.global_step
        self._batch_index = index
        watched = bool(self._replayed) or any(o.guard.known.in_a_row > 0 for o in self._optimizers)
        if step != self._step:
            self._step, self._kept = step, KeptStep()
            if watched:
                self._watched().clear()
            elif self._watch is not None:
                self._watch.remove()
                self._watch = None
        if watched or self._most <= _UNWATCHED:
            if not self._kept.batches:
                self._kept = KeptStep(random=random_streams())
            known = self._replayed[len(self._kept.batches) :]
            self._kept.batches.append(KeptBatch(batch, known[0] if known else index))

    def _watched(self) -> FiniteWatch:
        if self._watch is None:
            assert self._strategy.model is not None
            self._watch = FiniteWatch(self._strategy.model, _each_expert)
            self._watch.install()
        return self._watch

    def note(self, optimizer: TiledOptimizer) -> StepNote:
        """Of an optimizer's step that is about to be taken or left out."""
        module = self._strategy.lightning_module
        assert module is not None
        seen = [] if self._watch is None else self._watch.seen
        return StepNote(module.trainer.global_step + 1, self._kept, self._batch_index, optimizer.losses, seen)

    def skipped(self, optimizer: TiledOptimizer, note: StepNote, gradients_are_there: bool) -> None:
        """An optimizer's step was left out, on all ranks; collective."""
        reports: list[RankReport] = of_all_ranks(self._report(note), self._strategy.topology.host)
        culprit = optimizer.culprit() if gradients_are_there else "some parameter"
        what = told(reports) or f"the gradient of {culprit} after its reduction"
        step, in_a_row = note.step, optimizer.guard.known.in_a_row
        if not self._replayed:
            self._say(f"step {step} is not taken: infinite or NaN was first {what}")
        assert self._most is not None
        if in_a_row >= self._most:
            self._origin, self._ended_by = what, note
            times = f"each of the last {in_a_row} steps" if in_a_row > 1 else f"step {step}"
            self._ending = (
                f"{times} had an infinity or NaN in a gradient or loss, and none was taken; in step {step} it was "
                f"first {what}; look at the data and the learning rate of the steps before. Legal: "
                "TexMoEStrategy(max_skipped_steps=..), None to take such steps"
            )

    def _report(self, note: StepNote) -> RankReport:
        arisen = None if self._watch is None else self._watch.first(note.seen)
        bad = list(self._bad_parameters())
        inside = [said for name, said in bad if arisen and name.startswith(f"{arisen.module}.")] if arisen else []
        order, what = (arisen.order, arisen.what) if arisen else (None, "")
        if any(not bool(t.isfinite().all()) for kept in note.kept.batches for _, t in tensors_in(kept.batch)):
            order, what = -1, "the batch itself"
        parameter = inside[0] if inside else bad[0][1] if bad else None
        loss_is_finite = all(bool(loss.isfinite().all()) for loss in note.losses)
        return RankReport(loss_is_finite, order, what, parameter, bool(inside), self._batch_in_words(note))

    def _bad_parameters(self) -> Iterator[tuple[str, str]]:
        """Names of parameters that are not finite, and how to say so."""
        assert self._strategy.model is not None
        parameters = dict(self._strategy.model.named_parameters())
        for name, sharding in parameter_shardings(self._strategy.model, self._strategy.topology).items():
            value = parameters[name].detach()
            if not value.is_floating_point() or bool(value.isfinite().all()):
                continue
            if any(axis.name == "expert" for axis, _ in sharding.shard_dims):
                sound = value.isfinite().flatten(1).all(1).tolist()
                yield name, f"{name} of expert {sharding.box.extent.offsets[0] + sound.index(False)}"
            else:
                yield name, name

    def _batch_in_words(self, note: StepNote) -> str:
        samples = [number for kept in note.kept.batches for number in _sample_ids(kept.batch)]
        index = ", ".join(str(kept.index) for kept in note.kept.batches) or str(note.batch_index)
        more = f", samples {', '.join(map(str, samples))}" if samples else ""
        return f"batch {index} of data rank {self._strategy.topology.data.rank}{more}"

    # --- between steps

    def step_boundary(self) -> None:
        """End training if enough steps were skipped; collective.

        Raises:
            NonFiniteSteps: naming what was first not finite, and the dump.
        """
        if self._ending is None or self._ended_by is None:
            return
        said, self._ending = self._ending, None
        if self._watch is not None:
            self._watch.remove()
        dump = self._dump(said, self._ended_by)
        if dump is not None:
            said = f"{said}. `lightning-tex replay {dump}` takes that step again"
        raise NonFiniteSteps(said, self._origin)

    def _dump(self, said: str, note: StepNote) -> Path | None:
        strategy = self._strategy
        assert strategy.lightning_module is not None
        trainer = strategy.lightning_module.trainer
        folder = checkpoint_folder(trainer)
        if folder is None or not note.kept.batches:
            return None
        # A dump is files to look at: where checkpoints are elsewhere, it lies here.
        mounted = next(place for place in (folder, at(trainer.default_root_dir), Path.cwd()) if isinstance(place, Path))
        path = mounted / f"{DUMPED}{note.step}"
        write_dump(strategy, trainer, path, note.kept, said, note.step)
        return path

    def _say(self, text: str) -> None:
        if not self._strategy.is_global_zero:
            return
        now = time.monotonic()
        if self._said >= _SAID_AT_ONCE and now - self._said_last < _BETWEEN:
            self._unsaid += 1
            return
        more = f" ({self._unsaid} more steps since the last message)" if self._unsaid else ""
        self._said, self._unsaid, self._said_last = self._said + 1, 0, now
        print(f"lightning_tex: {text}{more}", file=sys.stderr, flush=True)


class _Watcher:
    """Tells of one optimizer's steps; a :class:`~lightning_tex.optim.skipping.StepWatcher`."""

    def __init__(self, steps: SkippedSteps, optimizer: TiledOptimizer) -> None:
        self._steps, self._optimizer = steps, optimizer

    def note(self) -> StepNote:
        return self._steps.note(self._optimizer)

    def skipped(self, note: StepNote, gradients_are_there: bool) -> None:
        self._steps.skipped(self._optimizer, note, gradients_are_there)


def _each_expert(module: nn.Module, inputs: tuple[Any, ...]) -> Iterable[tuple[str, Tensor]]:
    """What the experts of this rank give for the rows that arrived, before it travels and is summed."""
    if not isinstance(module, HeldExperts):
        return
    for number, output in zip(module.held, module.own_outputs(inputs[0]), strict=True):
        yield f"output of expert {number}", output


def _sample_ids(batch: Any) -> list[int]:
    """Of a batch that is a dict and says so, as :class:`TextDataModule`'s does."""
    named = batch if isinstance(batch, dict) else {}
    ids = named.get("sample", named.get("sample_ids"))
    return ids.reshape(-1).tolist() if isinstance(ids, torch.Tensor) else []
