"""Out of memory, on the device or the host: which rank, where, what the plan foresaw, and what the allocator has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import Trainer

from lightning_tex.moe import MoE
from lightning_tex.parallel.errors import UserRuntimeError
from lightning_tex.parallel.flight_record import TRAINING
from lightning_tex.planner.memory import size
from lightning_tex.strategy.memory_check import MemoryPlan

# What torch says where it raises no type of its own.
_WORDS = ("CUDA out of memory", "CUDA error: out of memory", "can't allocate memory")


class OutOfMemory(UserRuntimeError, MemoryError):
    """A rank has run out of memory; the first line says where, further ones what takes it."""


class DeviceOutOfMemory(OutOfMemory, torch.OutOfMemoryError):
    """The same of a device's memory."""


@contextmanager
def named_out_of_memory(strategy: Any, trainer: Trainer) -> Iterator[None]:
    """Inside, an error of an allocator becomes one that says what is known of it.

    Args:
        strategy: a TexMoEStrategy.
        trainer: what runs.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        kind = DeviceOutOfMemory if isinstance(error, torch.OutOfMemoryError) else OutOfMemory
        raise kind(_explained(error, strategy, trainer)).with_traceback(error.__traceback__) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator has refused."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def _explained(error: BaseException, strategy: Any, trainer: Trainer) -> str:
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    layer = f", in {TRAINING.layer}" if TRAINING.layer else ""
    head = f"out of memory on rank {strategy.global_rank} after step {trainer.global_step}{layer}: {said}"
    facts = (_planned, _allocated, _arrived)
    return "\n".join([head, *(f"  {told}" for fact in facts if (told := _known(fact, strategy))), f"  {_LEGAL}"])


def _known(fact: Callable[[Any], str | None], strategy: Any) -> str | None:
    # Nothing that is not known may hide what is.
    try:
        return fact(strategy)
    except Exception as error:
        return f"{fact.__name__.strip('_')}: not known ({type(error).__name__})"


def _planned(strategy: Any) -> str | None:
    layout = strategy.topology.layout
    plan = MemoryPlan.of(**strategy.memory_options(layout), trace=False)
    if plan is None:
        return None
    return f"planned: about {size(plan.needed.peak)} on each rank of {layout}: {plan.breakdown()}"


def _allocated(strategy: Any) -> str | None:
    if strategy.root_device.type != "cuda":
        return None
    statistics = torch.cuda.memory_stats(strategy.root_device)
    free, total = torch.cuda.mem_get_info(strategy.root_device)
    now, most = (statistics[f"allocated_bytes.all.{kind}"] for kind in ("current", "peak"))
    reserved = statistics["reserved_bytes.all.current"]
    return (
        f"allocated: {size(now)} in tensors (at most {size(most)}), {size(reserved - now)} reserved beside them, "
        f"{size(total - free - reserved)} taken outside of torch's allocator, {size(free)} free of {size(total)}; "
        f"{statistics['num_alloc_retries']} retries"
    )


def _arrived(strategy: Any) -> str | None:
    layers = [
        (share, module.last_arrived_rows, name)
        for name, module in strategy.model.named_modules()
        if isinstance(module, MoE) and (share := module.imbalance()) is not None
    ]
    if not layers:
        return None
    share, rows, name = max(layers)
    return f"arrived: {rows} rows at this rank's experts of {name}, {share:.2f} times the mean over ranks, at the most"


_LEGAL = (
    "Legal: smaller micro-batches with accumulate_grad_batches, activation_checkpointing, a larger tensor or expert "
    "axis, a capacity_factor where few experts get most tokens; `lightning-tex plan` shows what fits"
)
