"""Sequences that grow over a training: rows are divided into shorter ones until then."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import MutableMapping
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_tex.parallel.errors import UserValueError


class SequenceLengthSchedule(Callback):
    """Train on shorter sequences first: by the optimizer step, rows are divided into such of a length that grows.

    A batch of ``input_ids`` [b, S] becomes one of [b S / s, s] with the same tokens, in the same order and with the
    same labels: each step has as many tokens as ever, of which none is not learnt, but sees less before it. What else
    has a shape of [b, S, ..] is divided likewise, what has one of [b, ..] repeated. It is a function of the step alone,
    the same on every layout, and a resumed run goes on as it would have. Plans are of S.

    Args:
        lengths: pairs of an optimizer step and s, which holds from there on; S before the first.

    Raises:
        ValueError: steps that do not rise, or lengths below 1; in training, one that does not divide S, or a batch
            that has no ``input_ids``.
    """

    def __init__(self, lengths: list[list[int]]) -> None:
        steps = [pair[0] for pair in lengths]
        if not lengths or any(len(pair) != 2 or pair[1] < 1 for pair in lengths) or steps != sorted(set(steps)):
            raise UserValueError(
                f"SequenceLengthSchedule({lengths}); legal: pairs of a step and a length of 1 or more, steps rising"
            )
        self.steps, self.lengths = steps, [pair[1] for pair in lengths]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now = bisect_right(self.steps, trainer.global_step)
        if now:
            divide(batch, self.lengths[now - 1])


def divide(batch: Any, length: int) -> None:
    """Divide the rows of a batch into such of a length, in its place.

    Raises:
        ValueError: it has none that can be.
    """
    inputs = batch.get("input_ids") if isinstance(batch, MutableMapping) else None
    if not isinstance(inputs, Tensor) or inputs.dim() != 2 or inputs.shape[1] % length:
        has = f"input_ids of shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else f"a {type(batch).__name__}"
        raise UserValueError(
            f"SequenceLengthSchedule: {has} cannot be divided into rows of {length}; legal: a dict with input_ids [b, "
            "S], and divisors of S"
        )
    rows, whole = inputs.shape
    for name, values in batch.items():
        if isinstance(values, Tensor) and values.dim() and values.shape[0] == rows:
            if values.shape[1:2] == (whole,):
                batch[name] = values.reshape(-1, length, *values.shape[2:])
            else:
                batch[name] = values.repeat_interleave(whole // length, 0)
