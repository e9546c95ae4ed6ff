"""A dry run: the real model and the real strategy take a step as one rank of a world that does not exist."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, Literal

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_tex.data import TokenDataModule
from lightning_tex.parallel.activation_checkpointing import stash, stash_bytes
from lightning_tex.parallel.byte_meter import Sent
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.sharding import parameter_shardings
from lightning_tex.planner.fake_values import Routing, ShapesOnly
from lightning_tex.planner_trace.batches import MadeUpBlocks
from lightning_tex.planner_trace.patches import patch_trainer, patched_for_a_trace
from lightning_tex.planner_trace.states import state_bytes, states
from lightning_tex.planner_trace.tracker import Tracker
from lightning_tex.planner_trace.world import one_of_many
from lightning_tex.recipe import BARE_TRAINER, Recipe, quiet
from lightning_tex.strategy import TexMoEStrategy


@dataclass(frozen=True)
class Trace:
    """What one rank does in one optimizer step, the second of a run, when all states exist.

    Args:
        layout: sizes of all axes.
        rank: the rank that was traced.
        parameters: of the whole model, each once.
        state_bytes: kept between steps: ``dense_parameters``, ``expert_parameters``, ``gradients``, ``master``,
            ``moments`` (and what else the optimizer keeps). Padding of flat buffers is in it.
        peak_bytes: most bytes live at once in the step.
        peak_bytes_by_kind: what they were: the states; ``activations`` (saved ones, and temporaries of forward and
            backward); ``stash`` (what communication-aware recomputation keeps of collectives); ``collective`` (what
            collectives read or write, and is neither of these); ``tile`` (temporaries of the optimizer step);
            ``other`` (small things that were there before).
        most_bytes_by_kind: most bytes of each kind at once, whenever that was.
        stash_bytes_by_block: what each recomputed block's tape keeps.
        sent_bytes, calls: by operation, axis and pass; see :class:`lightning_tex.parallel.byte_meter.ByteMeter`.
        flops: of products, by pass; see :mod:`lightning_tex.planner_trace.flops`.
        seconds: of processor time that the trace took.
    """

    layout: Layout
    rank: int
    parameters: int
    state_bytes: Mapping[str, int]
    peak_bytes: int
    peak_bytes_by_kind: Mapping[str, int]
    most_bytes_by_kind: Mapping[str, int]
    stash_bytes_by_block: Mapping[str, int]
    sent_bytes: Mapping[Sent, float]
    calls: Mapping[Sent, int]
    flops: Mapping[str, int]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what was sent has keys ``operation/axis/pass``."""
        plain = {**vars(self), "layout": {**asdict(self.layout), "data": self.layout.data}}
        plain["layout"]["expert_data"] = self.layout.expert_data
        for name in ("sent_bytes", "calls"):
            plain[name] = {"/".join(kind): count for kind, count in plain[name].items()}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in plain.items()}


def trace(
    recipe: Recipe,
    world_size: int,
    rank: int = 0,
    strategy: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
    imbalance: float = 1.0,
    own_data: bool = False,
    device: Literal["cpu", "cuda"] | None = None,
) -> Trace:
    """Take two optimizer steps of a recipe as one rank of a world of any size, and read the second.

    Everything that runs is what trains: LightningCLI's model and Trainer, the strategy, its collectives and optimizer;
    they run on CPU kernels. Only floating-point tensors have no contents, and the process group is torch's fake
    one, so that neither memory nor other processes are needed. A :class:`TokenDataModule` gives blocks of made-up
    tokens; another data module gives its own first batches.

    What depends on values is assumed: routers spread their choices evenly (but for ``imbalance``), gradients are
    finite, and every rank does what this one does.

    Args:
        recipe: the recipe.
        world_size: ranks in all; any number that the layout allows.
        rank: the one to play.
        strategy: arguments of the strategy that replace the recipe's.
        trainer: arguments of the Trainer that replace the recipe's, such as ``precision``.
        imbalance: choices of experts that fall on the traced rank's, relative to the mean over ranks;
            at most all of them.
        device: the one that is pretended, where the package tells devices apart: how gradients are reduced, how large
            an optimizer tile is. ``None``: those of GPUs, unless the recipe's accelerator is ``cpu``.
        own_data: take a :class:`TokenDataModule`'s own batches, too, which needs its data.

    Raises:
        ValueError: a layout, rank or model that is not legal, or an imbalance that is not positive.
        RuntimeError: the process has joined a process group already.
    """
    if imbalance <= 0:
        raise UserValueError(f"imbalance={imbalance}; legal: above 0, 1 being perfect balance")
    began = time.process_time()
    kind: Literal["cpu", "cuda"] = device or ("cpu" if recipe.accelerator() == "cpu" else "cuda")
    routing, tracker = Routing(imbalance), Tracker()
    with (
        one_of_many(rank, world_size) as environment,
        ShapesOnly(routing),
        tracker,
        patched_for_a_trace(kind),
        quiet(),
    ):
        given = {**(trainer or {}), **_DRY, "devices": world_size, "plugins": [environment.described()]}
        fit = recipe.instantiate({**(strategy or {}), **_ALONE}, given)
        reader = _Reader(tracker, routing)
        fit.trainer.callbacks.append(reader)  # type: ignore[attr-defined]
        data = fit.datamodule
        if isinstance(data, TokenDataModule) and not own_data:
            data = MadeUpBlocks.like(data)
        patch_trainer(fit.trainer)
        fit.trainer.fit(fit.model, data)
    if reader.read is None:
        raise UserValueError("the recipe's data ended before 2 optimizer steps, which a trace takes; legal: more data")
    return Trace(rank=rank, seconds=time.process_time() - began, **reader.read)


# There are no others to compare values with.
_ALONE: dict[str, Any] = {"check_replicas_every_n_steps": 0}

# What a Trainer does besides training.
_DRY: dict[str, Any] = {
    **BARE_TRAINER,
    "accelerator": "cpu",
    "num_nodes": 1,
    "max_steps": 2,
    "max_epochs": -1,
    "max_time": None,
    "limit_train_batches": 1.0,
    "limit_val_batches": 0,
    "val_check_interval": 1.0,
    "check_val_every_n_epoch": 1,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1000,
    "profiler": None,
    "fast_dev_run": False,
    "overfit_batches": 0.0,
}


class _Reader(Callback):
    """Tells the tracker what it sees, and reads it after the second step.

    Args:
        tracker: sees the operations.
        routing: is told the layout.
    """

    def __init__(self, tracker: Tracker, routing: Routing) -> None:
        self.tracker, self.routing = tracker, routing
        self.read: dict[str, Any] | None = None
        self._begun = False

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        expert = TexMoEStrategy.of(trainer).topology.expert
        self.routing.parts, self.routing.part = expert.size, expert.rank
        optimizer = TexMoEStrategy.of(trainer).tiled_optimizer
        if optimizer is not None:
            optimizer.register_step_pre_hook(lambda *_: self._stepping("tile"))
            optimizer.register_step_post_hook(lambda *_: self._stepping(None))

    def _stepping(self, kind: str | None) -> None:
        self.tracker.kind = kind

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1 and not self._begun:
            self._begun = True
            for kind, tensor in self._states(trainer, module):
                self.tracker.tell([tensor], kind, anew=True)
            meter = TexMoEStrategy.of(trainer).topology.world.meter
            assert meter is not None
            meter.start()
            self.tracker.begin()

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        self.tracker.tell(stash(module), "stash", anew=True)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step < 2 or self.read is not None:
            return
        self.tracker.end()
        strategy = TexMoEStrategy.of(trainer)
        meter = strategy.topology.world.meter
        assert meter is not None
        meter.stop()
        moments = self.tracker.over_time()
        peak = max(moments, key=lambda live: sum(live.values()))
        kinds = {kind for live in moments for kind in live}
        shardings = parameter_shardings(module, strategy.topology)
        self.read = {
            "layout": strategy.topology.layout,
            "parameters": sum(prod(sharding.box.full) for sharding in shardings.values()),
            "state_bytes": state_bytes(module, strategy.topology, strategy.stepped),
            "peak_bytes": sum(peak.values()),
            "peak_bytes_by_kind": peak,
            "most_bytes_by_kind": {kind: max(live.get(kind, 0) for live in moments) for kind in sorted(kinds)},
            "stash_bytes_by_block": stash_bytes(module),
            "sent_bytes": meter.sent_bytes(),
            "calls": meter.calls(),
            "flops": dict(self.tracker.flops),
        }

    def _states(self, trainer: Trainer, module: LightningModule) -> Any:
        strategy = TexMoEStrategy.of(trainer)
        return states(module, strategy.topology, strategy.stepped)
