"""What a Trainer's ``ckpt_path`` stands for: ``"last"``, ``"auto"``, or a path that must hold what it is taken for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

from lightning import Trainer
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_tex.parallel.errors import UserError, UserFileError, UserValueError
from lightning_tex.saving import (
    CorruptCheckpointError,
    Location,
    RefusedCheckpointError,
    SavedState,
    Search,
    at,
    find,
    latest,
    paths,
)
from lightning_tex.saving.contents import holds_whole_state
from lightning_tex.strategy.checkpoint_folders import places, saves_on_exception

LAST: Final = "last"
AUTO: Final = "auto"


class Resuming(Protocol):
    """What the strategy has to do with it."""

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """Lightning's plugin."""

    @property
    def saved_here(self) -> frozenset[Location]:
        """What this Trainer has saved itself, links resolved."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Rank 0's object."""

    def agree_to_resume(self, ckpt_path: str | None) -> None:
        """Called first, with a word, "a path" or ``None``; collective."""

    def finish_loading(self) -> None:
        """Called when hooks of the start are through; collective."""

    def begin_from_weights(self) -> None:
        """Called when nothing was loaded; collective."""


class CheckpointConnector(_CheckpointConnector):
    """Lightning's, but for what is resumed from: rank 0 looks, and all ranks take its answer.

    ``"last"`` is the newest complete whole state of :func:`places`, in an evaluation perhaps weights alone;
    ``"auto"`` the same, and a new run where there is nothing at all. What turns out to be damaged is passed over by
    name, also if only its digests tell; nothing but damaged ones is an error. A path that a fit is given must lead to a
    whole state.

    Args:
        trainer: whose ``ckpt_path`` it is.
        strategy: the Trainer's.
    """

    def __init__(self, trainer: Trainer, strategy: Resuming) -> None:
        super().__init__(trainer)
        self._strategy = strategy
        self._put_off: tuple[Any, bool | None] = (None, None)

    @classmethod
    def take_over(cls, trainer: Trainer, strategy: Resuming) -> None:
        """Put one into the place of the Trainer's, with the state of that."""
        replaced = trainer._checkpoint_connector
        if not isinstance(replaced, cls):
            connector = cls(trainer, strategy)
            vars(connector).update(vars(replaced))
            trainer._checkpoint_connector = connector

    @property
    def _fitting(self) -> bool:
        return self.trainer.state.fn == TrainerFn.FITTING

    def _parse_ckpt_path(self, state_fn: TrainerFn, ckpt_path: Any, model_provided: bool, model_connected: bool) -> Any:
        """Leave our words as they are: ranks decide together, and cannot speak to one another yet."""
        if ckpt_path in (LAST, AUTO):
            return ckpt_path
        requeued = SLURMEnvironment.detect() and self._hpc_resume_path is not None
        if ckpt_path is None and self._fitting and saves_on_exception(self.trainer) and not requeued:
            return AUTO
        return super()._parse_ckpt_path(state_fn, ckpt_path, model_provided, model_connected)

    def resume_start(self, checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
        """Load what ``checkpoint_path`` stands for; collective.

        Raises:
            FileNotFoundError: there is nothing to resume from.
            CorruptCheckpointError: what there is is damaged.
            ValueError: a fit would resume from weights alone.
            RuntimeError: ranks would resume from different things.
        """
        word = checkpoint_path in (LAST, AUTO)
        self._strategy.agree_to_resume("a path" if checkpoint_path and not word else checkpoint_path)
        if word:
            resume = self._resume_newest if self._is_searchable() else self._resume_lightnings_last
            resume(checkpoint_path, weights_only)
        elif checkpoint_path:
            self._resume_from(checkpoint_path, weights_only)
        else:
            super().resume_start(None)
        if not self._ckpt_path:
            self._strategy.begin_from_weights()

    def _restore_modules_and_callbacks(self, checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
        """Put off until the strategy has sharded the model."""
        self._put_off = (checkpoint_path, weights_only)

    def restore_what_was_put_off(self) -> None:
        """Load what was asked for, and restore the model, data module and callbacks from it; collective."""
        super()._restore_modules_and_callbacks(*self._put_off)

    def restore_training_state(self) -> None:
        """The optimizers' states first, which Lightning leaves to the strategy."""
        self._strategy.finish_loading()
        super().restore_training_state()

    def restore_lr_schedulers(self) -> None:
        """Leave out those that ``StochasticWeightAveraging`` has put its own in the place of, and restores itself.

        It clears them at the start of a fit, for which its state is restored too late where weights are read into
        parts.
        """
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StochasticWeightAveraging) and callback._scheduler_state is not None:
                callback._clear_schedulers(self.trainer)
        super().restore_lr_schedulers()

    # --- by a word

    def _resume_newest(self, word: str, weights_only: bool | None) -> None:
        search = Search([], self._strategy.saved_here)
        candidates = self._candidates(search)
        while state := self._decided(lambda: next(candidates, None)):
            try:
                super().resume_start(str(state.path), weights_only)
            except RefusedCheckpointError as error:
                self._ckpt_path = None
                search.damaged += error.problems
            else:
                self._tell(word, state, search)
                return
        self._begin_anew(word, search)

    def _candidates(self, search: Search) -> Iterator[SavedState]:
        search.places = places(self.trainer)
        yield from search
        if not self._fitting:
            yield from search.weights

    def _tell(self, word: str, state: SavedState, search: Search) -> None:
        said = f"ckpt_path={word!r} is {state.path}, step {state.step}"
        if search.damaged:
            rank_zero_warn(f"{said}; passed over as damaged: {'; '.join(search.damaged)}")
        for other in search.heads:
            if other.written > state.written and other.step < state.step:
                rank_zero_warn(
                    f"{said}, which has most steps; {other.path}, step {other.step}, was written later: name it as "
                    "ckpt_path to go on from it"
                )

    def _begin_anew(self, word: str, search: Search) -> None:
        """Where there is nothing to resume from: what is wrong is raised on all ranks."""

        def refuse() -> str:
            folders = ", ".join(dict.fromkeys(str(place.folder / place.names) for place in search.places))
            if search.damaged:
                raise CorruptCheckpointError(
                    f"ckpt_path={word!r}: there is nothing but damaged checkpoints: {'; '.join(search.damaged)}"
                )
            weights = "".join(f"; {state.path} holds weights only" for state in search.weights)
            return f"there is no whole state in {folders}{weights}"

        self._nothing(word, self._decided(refuse))

    def _nothing(self, word: str, reason: str) -> None:
        if not (word == AUTO and self._fitting):
            legal = "ckpt_path='auto' (begins anew where there is nothing) or a path" if self._fitting else "a path"
            raise UserFileError(f"ckpt_path={word!r}: {reason}; legal: {legal}")
        rank_zero_info(f"ckpt_path='auto': {reason}, so a new run begins")

    def _is_searchable(self) -> bool:
        return type(self._strategy.checkpoint_io) is TorchCheckpointIO

    def _resume_lightnings_last(self, word: str, weights_only: bool | None) -> None:
        """Through a plugin of the user's: the newest that Lightning takes for the last."""
        path = self._decided(self._lightnings_last)
        if path:
            self._resume_from(path, weights_only)
        else:
            self._nothing(word, "Lightning found none whose name begins with last")

    def _lightnings_last(self) -> Any:
        assert self.trainer.state.fn is not None
        return super()._parse_ckpt_path(self.trainer.state.fn, LAST, model_provided=True, model_connected=True)

    # --- by a path

    def _resume_from(self, path: Any, weights_only: bool | None) -> None:
        known = self._is_searchable()
        if known:
            self._decided(lambda: _require(at(path), whole=self._fitting))
        super().resume_start(path, weights_only)
        if not known and self._fitting and not holds_whole_state(self._loaded_checkpoint, directory=False):
            raise UserValueError(_weights_only(path))

    # --- together

    def _decided(self, decide: Callable[[], Any]) -> Any:
        """What rank 0 makes of it, on all ranks; what it raises is raised on all."""
        answer = None
        if self.trainer.is_global_zero:
            try:
                answer = decide()
            except (UserError, OSError) as error:
                answer = error
        answer = self._strategy.broadcast(answer)
        if isinstance(answer, Exception):
            raise answer
        return answer


def _require(path: Location, whole: bool) -> None:
    """Raise if there is no checkpoint, or a damaged plain file, or weights where a whole state is needed.

    A damaged directory is refused when it is loaded, with all that is wrong.
    """
    found = find(path)
    try:
        is_whole = SavedState.of(found).is_whole()
    except CorruptCheckpointError as error:
        if paths.is_directory(found):
            return
        other = latest(found.parent, without=found)
        hint = f"\nThe newest complete whole state there is {other}" if other else ""
        raise CorruptCheckpointError(f"the checkpoint {path} is refused: {error}{hint}") from None
    if whole and not is_whole:
        raise UserValueError(_weights_only(path))


def _weights_only(path: Any) -> str:
    return (
        f"{path} holds weights only, no optimizer states, so no fit can go on from it; legal: "
        f"TexMoEStrategy(init_from={str(path)!r}) (--trainer.strategy.init_from), which begins a new run from its "
        "weights; it can be ckpt_path of validate, test and predict"
    )
