"""One forward and backward of one micro-batch of a module, as a layout's first rank, without its memory.

The module is copied with tensors that have no contents, sharded, and run: its own ``training_step``, TEX layers'
collectives over process groups that move nothing, recomputation of its blocks, the backward. Neither the module nor
the random numbers of the process are touched, and no optimizer is there: gradients are added to memory that exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from lightning import LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_tex.moe.losses import auxiliary_loss
from lightning_tex.parallel.activation_checkpointing import recompute_blocks, stash
from lightning_tex.parallel.device import pretend_device
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.precision import PRECISIONS, keeps_full_precision
from lightning_tex.parallel.sharding import shard_module
from lightning_tex.planner.allocation_timeline import AllocationTimeline
from lightning_tex.planner.batches import Batches
from lightning_tex.planner.copies import undisturbed, without_values
from lightning_tex.planner.fake_values import Routing, ShapesOnly
from lightning_tex.planner.layouts import Candidate, Job
from lightning_tex.planner.pretended_trainer import PretendedTrainer
from lightning_tex.planner.pretended_world import pretended_topology

NOT_YET = 1 << 30  # above every place of a parameter
KINDS = ("activations", "stash", "working")


@dataclass(frozen=True, eq=False)
class MicroStepTrace:
    """Bytes that live after each operation of a forward and backward, beside parameters and gradients.

    Args:
        live: activations that the forward keeps for the backward, stash, and what is neither. [3, operations]
        reached: of each operation the place of the first parameter whose gradient and all later ones' are there; a
            larger number before the first of them. [operations]
        forward: operations of the forward, which is over then.
        marks: operations before each module whose begin was to be noted.
    """

    live: np.ndarray
    reached: np.ndarray
    forward: int
    marks: tuple[int, ...] = ()

    def alike(self, other: MicroStepTrace) -> bool:
        """Whether another one has as many operations; the order of a block's gradients differs from run to run."""
        return (self.forward, len(self.reached)) == (other.forward, len(other.reached))


def trace_micro_step(
    module: LightningModule, policy: set[type[nn.Module]] | None, batches: Batches, job: Job, candidate: Candidate,
    device: str, marks: Sequence[str] = (),
) -> MicroStepTrace:  # fmt: skip
    """Run one micro-step of a module on a layout that need not exist.

    Args:
        module: whole or sharded, on any device; left as it is.
        policy: classes of the blocks that are recomputed, as the strategy's ``activation_checkpointing_policy``.
        batches: give the micro-batch.
        job, candidate: what is trained, and how.
        device: ``cuda`` or ``cpu``, whose code paths are taken.
        marks: names of modules, each of which begins its forward at an operation that is to be noted.

    Raises:
        Exception: whatever the module raises, or what cannot be run without values.
    """
    timeline = AllocationTimeline()
    imbalance = Routing(job.imbalance, candidate.layout.expert, 0)
    with (
        undisturbed(),
        pretended_topology(candidate.layout, candidate.communication) as topology,
        ShapesOnly(imbalance),
        pretend_device("cpu" if device == "cpu" else "cuda"),
    ):
        copied = without_values(module)
        trainer = PretendedTrainer(topology.data, topology.layout.world)
        copied.trainer = trainer  # type: ignore[assignment]
        shard_module(copied, topology)
        recompute_blocks(copied, candidate.activation_checkpointing, policy)
        _store(copied, job.precision)
        reached, begun = _gradients_noted(copied, timeline), _begins_noted(copied, marks, timeline)
        with timeline:
            timeline.begin()
            total = _loss(copied, batches.of(candidate.micro_batch, job.sequence_length), job.precision)
            forward = timeline.operation
            timeline.tell(stash(copied), "stash", anew=True)
            timeline.tell_rest("activations")
            timeline.kind = "working"
            total.backward()
            timeline.end()
    return replace(_read(timeline, reached, forward), marks=tuple(begun[name] for name in marks))


def _store(module: nn.Module, precision: str) -> None:
    """Parameters, and in true precisions buffers, in the dtypes in which a precision keeps them."""
    dtypes = PRECISIONS[precision]
    for part in module.modules():
        dtype = dtypes.full if keeps_full_precision(part) else dtypes.usual
        kept: list[Tensor] = list(part.parameters(recurse=False))
        kept += part.buffers(recurse=False) if precision.endswith("true") else []
        for tensor in kept:
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


def _gradients_noted(module: nn.Module, timeline: AllocationTimeline) -> dict[int, int]:
    """Memory for every gradient, and a note of the operation after which each is in it, by the parameter's place."""
    reached: dict[int, int] = {}

    def note(place: int) -> Callable[[Tensor], None]:
        def there(_: Tensor) -> None:
            reached[timeline.operation] = min(place, reached.get(timeline.operation, place))

        return there

    for place, parameter in enumerate(module.parameters()):
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            parameter.register_post_accumulate_grad_hook(note(place))
    return reached


def _begins_noted(module: nn.Module, names: Sequence[str], timeline: AllocationTimeline) -> dict[str, int]:
    """The operations before the first forward of each of these modules, by name."""
    begun: dict[str, int] = {}
    for name in names:
        module.get_submodule(name).register_forward_pre_hook(
            lambda *_, name=name: begun.setdefault(name, timeline.operation) and None
        )
    return begun


def _loss(module: LightningModule, batch: Any, precision: str) -> Tensor:
    """What the backward of a micro-batch begins with."""
    if not module.automatic_optimization:
        raise UserValueError("it is optimized manually")
    dtype = PRECISIONS[precision].usual
    autocast = torch.autocast("cpu", dtype) if precision.endswith("mixed") else nullcontext()
    if precision.endswith("true"):
        batch = apply_to_collection(batch, Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t)
        torch.set_default_dtype(dtype)
    index = {"batch_idx": 0} if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2) else {}
    with autocast:
        result = module.training_step(batch, **index)
    loss = result.get("loss") if isinstance(result, dict) else result
    if not isinstance(loss, Tensor):
        raise UserValueError("its training_step gives no loss")
    return loss + auxiliary_loss(module)


def _read(timeline: AllocationTimeline, reached: dict[int, int], forward: int) -> MicroStepTrace:
    live = np.zeros((len(KINDS), timeline.operation + 1), dtype=np.int64)
    for operation, change in timeline.changes().items():
        for kind, size in change.items():
            live[KINDS.index(kind), operation] += size
    places = np.full(live.shape[1], NOT_YET, dtype=np.int64)
    places[list(reached)] = list(reached.values())
    return MicroStepTrace(live.cumsum(1), np.minimum.accumulate(places), forward)
