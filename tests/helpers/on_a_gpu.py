"""What tests on a GPU share: one process, a world of one rank, and fits that leave nothing behind.

``LIGHTNING_TEX_TEST_DEVICE=cpu pytest tests/cuda`` tries the tests themselves where there is no GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from helpers.host_reads import HostRead, host_reads
from helpers.trainers import quiet, silence
from lightning_tex import TexMoEStrategy

DEVICE = torch.device(os.environ.get("LIGHTNING_TEX_TEST_DEVICE", "cuda"))
IS_GPU = DEVICE.type == "cuda"
ACCELERATOR = "gpu" if IS_GPU else "cpu"
FIRST_SCALE = 2.0**10  # of 16-mixed: no step of a small model is left out for it
# Places where the host reads what lies on it; the head looks at its targets on the CPU only.
_ON_THE_HOST = ("parallel/host_copy.py:", "resilience/vote.py:", "data/token_ids.py:", "layers/vocab.py:")


def leave_the_world() -> None:
    """End the process group, so that the next one may be of another backend."""
    if dist.is_initialized():
        dist.destroy_process_group()


def one_rank(accelerator: str, strategy: dict[str, Any] | None = None, **flags: Any) -> L.Trainer:
    """A quiet Trainer on one device, in a world that begins with it."""
    silence()
    leave_the_world()
    # Kernels are not compiled: that takes longer than all tests.
    options = {"compile": False, "check_memory": False, **(strategy or {})}
    defaults = {"max_steps": 3, "num_sanity_val_steps": 0, "limit_val_batches": 0, "use_distributed_sampler": False}
    if flags.get("precision") == "16-mixed" and accelerator == "gpu":
        scaler = torch.amp.GradScaler("cuda", init_scale=FIRST_SCALE)
        flags = {**flags, "precision": None, "plugins": [MixedPrecision("16-mixed", "cuda", scaler)]}
    return quiet(accelerator=accelerator, devices=1, strategy=TexMoEStrategy(**options), **{**defaults, **flags})


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, an operation of torch that makes the host wait for the GPU is an error."""
    if not IS_GPU:
        with host_reads() as reads:
            yield
        waits = [read for read in reads if not read.place.startswith(_ON_THE_HOST)]
        assert not waits, f"{len(waits)} waits: {waits[:5]}"
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class NoWaiting(L.Callback):
    """From one batch's start to a later one's end nothing may wait for the GPU, whatever happens in between.

    On a GPU a wait is an error where it happens; elsewhere :attr:`waits` has what would have been one.

    Args:
        first, last: batches, counted from 0.
    """

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.watched = 0
        self.reads: list[HostRead] = []
        self._watch = ExitStack()

    @property
    def waits(self) -> list[HostRead]:
        """Reads of what was on the host before, or is waited for a step late, are none."""
        return [read for read in self.reads if not read.place.startswith(_ON_THE_HOST)]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.first:
            if IS_GPU:
                torch.cuda.set_sync_debug_mode("error")
            else:
                self.reads = self._watch.enter_context(host_reads())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.watched += self.first <= batch_idx <= self.last
        if batch_idx == self.last:
            self._end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        self._watch.close()
        if IS_GPU:
            torch.cuda.set_sync_debug_mode("default")


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """The 2-norm of the difference is at most ``tolerance`` of the expected one's."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.isfinite().all(), f"{what} is not finite: {(~actual.isfinite()).sum()} of {actual.numel()} values"
    distance = float((actual - expected).norm() / expected.norm().clamp(min=1e-30))
    assert distance <= tolerance, f"{what} differs by {distance:.3g} of its norm {float(expected.norm()):.3g}"
