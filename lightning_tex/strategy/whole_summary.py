"""Lightning's summary of a model that ranks hold parts of: the sizes of the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary as SummaryCallback
from lightning.pytorch.utilities.model_summary import ModelSummary
from torch import nn

from lightning_tex.parallel.sharding import parameter_shardings
from lightning_tex.parallel.topology import Topology


class WholeModelSummary(ModelSummary):
    """Parameters of all ranks together, each counted once; sizes of activations and FLOPs are this rank's.

    Args:
        model, max_depth: as Lightning's.
        topology: the layout that the model is sharded for.
    """

    def __init__(self, model: LightningModule, max_depth: int, topology: Topology) -> None:
        super().__init__(model, max_depth)
        parameters = dict(model.named_parameters())
        whole = {name: prod(one.box.full) for name, one in parameter_shardings(model, topology).items()}
        self._whole = {id(parameters[name]): elements for name, elements in whole.items()}

    def _elements(self, module: nn.Module, trainable: bool = False) -> int:
        counted = (p for p in module.parameters() if p.requires_grad or not trainable)
        return sum(self._whole.get(id(parameter), parameter.numel()) for parameter in counted)

    @property
    def param_nums(self) -> list[int]:
        return [self._elements(layer._module) for layer in self._layer_summary.values()]

    @property
    def total_parameters(self) -> int:
        return self._elements(self._model)

    @property
    def trainable_parameters(self) -> int:
        return self._elements(self._model, trainable=True)

    @property
    def model_size(self) -> float:
        elements = ((self._whole.get(id(p), p.numel()), p.dtype.itemsize) for p in self._model.parameters())
        return sum(n * size for n, size in elements) / 1e6


@contextmanager
def whole_summaries(trainer: Trainer, topology: Callable[[], Topology]) -> Iterator[None]:
    """Inside, the Trainer's ``ModelSummary`` callbacks count whole parameters.

    Args:
        trainer: whose callbacks they are.
        topology: gives the layout, once there is one.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    summaries = [callback for callback in callbacks if isinstance(callback, SummaryCallback)]
    for callback in summaries:
        depth = callback._max_depth
        callback._summary = lambda _, model, depth=depth: WholeModelSummary(model, depth, topology())  # type: ignore
    try:
        yield
    finally:
        for callback in summaries:
            del callback._summary
