"""Training steps timed by part, by a callback: hooks of modules, the optimizer's methods, collectives."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_tex.bench.moments import Moment, synchronise
from lightning_tex.bench.part_timeline import Part, PartTimeline
from lightning_tex.parallel.activation_checkpointing import Recomputed
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.replay import current_pass
from lightning_tex.planner.layers import (
    Attention,
    ColumnLinear,
    CrossEntropy,
    Head,
    Layer,
    Linear,
    LinearCrossEntropy,
    Mlp,
    Moe,
    RowLinear,
    known_layer,
)
from lightning_tex.strategy import TexMoEStrategy

REST, OPTIMIZER, BETWEEN = "rest", "optimizer", "between"
_OF_LAYERS: dict[type, str] = {
    Attention: "attention",
    Moe: "MoE",
    Mlp: "MLP",
    Linear: "linear layers",
    ColumnLinear: "linear layers",
    RowLinear: "linear layers",
    Head: "head and loss",
    CrossEntropy: "head and loss",
    LinearCrossEntropy: "head and loss",
}
# Methods of the strategy's optimizer that a step calls.
_OF_OPTIMIZER = ("zero_grad", "reduce_gradients", "unscale", "clip_by_norm", "clip_by_value", "step")


def part_of(layer: Layer | None) -> str:
    """The part that a layer belongs to."""
    return _OF_LAYERS.get(type(layer), REST)


def parts_in(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that belong to a part of their own."""
    for child in module.children():
        name = part_of(known_layer(child))
        if name == REST:
            yield from parts_in(child)
        else:
            yield name, child


@dataclass
class Timed:
    """What a run showed, of rank 0.

    Args:
        seconds: of each step that ran as it always does.
        parts: seconds by part of each step that ran with its parts timed.
        tokens: of a step, all data ranks.
        length: of a sequence.
        peak_bytes: most that the allocator gave out in the first; ``None`` on CPU.
    """

    seconds: list[float]
    parts: list[dict[Part, float]]
    tokens: int
    length: int
    peak_bytes: int | None

    @property
    def step_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def median_parts(self) -> dict[Part, float]:
        """Median over steps of each part."""
        names = dict.fromkeys(part for step in self.parts for part in step)
        return {part: statistics.median(step.get(part, 0.0) for step in self.parts) for part in names}


class StepParts(Callback):
    """Times some steps as they are, then as many with their parts.

    A step is timed from its first micro-batch to that of the next. Nothing in it waits for the device.

    Args:
        warmup: steps before, at least 1.
        steps: of each kind.
    """

    def __init__(self, warmup: int, steps: int) -> None:
        self.warmup, self.steps = max(1, warmup), steps
        self.timed: Timed | None = None
        self._begins: list[Moment] = []
        self._parts: list[dict[Part, float]] = []
        self._seen = -1
        self._tokens = self._length = 0
        self._peak: int | None = None
        self._undo = ExitStack()
        self._timeline: PartTimeline | None = None

    @property
    def total_steps(self) -> int:
        """That the run needs; the last one ends what is timed."""
        return self.warmup + 2 * self.steps + 2

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self._seen:  # no further micro-batch of the same step
            self._seen = trainer.global_step
            self._step_begins(trainer, pl_module, trainer.global_step - self.warmup)
        if self._timeline is not None:
            self._timeline.phase(Part(REST, "forward"))
        if trainer.global_step == self.warmup:
            if not isinstance(batch, Mapping) or "input_ids" not in batch:
                raise UserValueError(f"tokens are those of batch['input_ids'], and a batch is a {type(batch).__name__}")
            ids = batch["input_ids"]
            self._tokens += ids.numel() * TexMoEStrategy.of(trainer).topology.layout.data
            self._length = ids.shape[-1]

    def _step_begins(self, trainer: Trainer, module: LightningModule, number: int) -> None:
        """``number``: from 0 on, of those that are timed."""
        device = module.device
        if number == 0 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        if 0 <= number <= self.steps:
            self._begins.append(Moment(device))
        if number == self.steps:
            synchronise(device)
            self._peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
            self._timeline = PartTimeline(device)
            self._attach(self._timeline, trainer, module)  # and one more step, to be warm with hooks
        if number > self.steps:
            assert self._timeline is not None
            self._timeline.stop()
            synchronise(device)
            self._parts.append(self._timeline.read())
        if number == 2 * self.steps + 1:
            self._undo.close()
            self._timeline = None
            seconds = [end - begin for begin, end in zip(self._begins, self._begins[1:], strict=False)]
            self.timed = Timed(seconds, self._parts[1:], self._tokens, self._length, self._peak)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._timeline is not None:
            self._timeline.phase(Part(REST, "backward"))

    def _attach(self, timeline: PartTimeline, trainer: Trainer, module: LightningModule) -> None:
        for name, part in parts_in(module):
            _hook(self._undo, timeline, name, part)
        for block in module.modules():
            forward = block.__dict__.get("forward")
            if isinstance(forward, Recomputed):
                _replace(self._undo, forward, "forward", timeline.recomputed(REST, forward.forward))
        optimizer = TexMoEStrategy.of(trainer).tiled_optimizer
        if optimizer is not None:
            for method in _OF_OPTIMIZER:
                marked = timeline.marked(OPTIMIZER, getattr(optimizer, method), "between")
                _replace(self._undo, optimizer, method, marked)
            ended = optimizer.backward_ended

            def backward_ended() -> None:
                ended()
                timeline.phase(Part(BETWEEN, "between"))

            _replace(self._undo, optimizer, "backward_ended", backward_ended)
        self._undo.enter_context(timeline.of_collectives())


def _hook(undo: ExitStack, timeline: PartTimeline, name: str, module: nn.Module) -> None:
    """Time a module's forward, first or repeated, and its backward, as a part."""

    def enter_forward(*_: Any) -> None:
        timeline.enter(name, "forward" if current_pass() == "forward" else "recompute")

    def enter_backward(*_: Any) -> None:
        timeline.enter(name, "backward")

    def leave(*_: Any) -> None:
        timeline.leave(name)

    for handle in (
        module.register_forward_pre_hook(enter_forward),
        module.register_forward_hook(leave, always_call=True),  # a recomputation ends early, by an exception
        module.register_full_backward_pre_hook(enter_backward),
        module.register_full_backward_hook(leave),
    ):
        undo.callback(handle.remove)


def _replace(undo: ExitStack, of: Any, name: str, function: Callable[..., Any]) -> None:
    """Put a function in the place of an object's own attribute or of its class's method."""
    own = vars(of).get(name)
    setattr(of, name, function)
    undo.callback(delattr, of, name) if own is None else undo.callback(setattr, of, name, own)
