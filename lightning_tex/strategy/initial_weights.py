"""Weights that a module is to begin with: they are read where a run begins, into parameters that were not drawn."""

from __future__ import annotations

from lightning import LightningModule

from lightning_tex.parallel.initialization import has_values
from lightning_tex.saving import ShardedRun, model_state
from lightning_tex.saving.checkpoint_format import Finish
from lightning_tex.saving.model_state import Source
from lightning_tex.saving.optimizer_loading import masters_from


class InitialWeights:
    """What a module's ``initial_weights()`` gives, a :class:`lightning_tex.saving.model_state.Source` or ``None``."""

    def __init__(self) -> None:
        self._awaited: Source | None = None

    def expect(self, module: LightningModule) -> list[str]:
        """Names of the parameters that will be filled, and so need not be drawn."""
        give = getattr(module, "initial_weights", None)
        if give is not None and any(parameter.is_meta for parameter in module.parameters()):
            self._awaited = give()
        return [] if self._awaited is None else [path[1] for path in self._awaited.saved]

    def forget(self) -> None:
        """Other weights have been loaded."""
        self._awaited = None

    def take(self, run: ShardedRun) -> Finish:
        """Read them, if they are still awaited, on this rank alone."""
        source, self._awaited = self._awaited, None
        if source is not None and all(map(has_values, run.module.parameters())):  # in a trace there are none
            model_state.load_model(run.module, run.topology, source, strict=False)
            return masters_from(source)
        return lambda _: {}
