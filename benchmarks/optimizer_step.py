"""The tiled optimizer step beside the sharded ones of other projects, where they can be had.

``lightning-tex bench optimizer`` with two more contestants, torch's ZeroRedundancyOptimizer and DeepSpeed's ZeRO-1; its
options are that command's:

    python benchmarks/optimizer_step.py --elements 1e6 1e7 --formats fp32 split --json
    torchrun --nproc-per-node 4 benchmarks/optimizer_step.py --experts 16
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_tex.bench.candidates import OPTIMIZERS, Build, Candidate, Workload, average
from lightning_tex.cli.bench import OPTIMIZER, bench_optimizer
from lightning_tex.parallel.errors import UserError

PIECES_PER_RANK = 4


def main(words: Sequence[str]) -> None:
    """Measure; a wrong option is one line."""
    try:
        replace(OPTIMIZER, action=partial(bench_optimizer, contestants=peers()))(words)
    except UserError as error:
        sys.exit(f"error: {error}")


def peers() -> dict[str, Build]:
    """Every peer by name. Building one that cannot be had raises."""
    return {"ZeroRedundancyOptimizer": ZeroRedundancy, "DeepSpeed ZeRO-1": DeepSpeed}


def require_processes(device: torch.device) -> None:
    """Make a process group of this process alone if there is none: sharded optimizers ask for one."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def pieces(flat: Tensor, ranks: int) -> list[Tensor]:
    """Views of a flat tensor that a peer can deal out whole."""
    return list(flat.chunk(PIECES_PER_RANK * ranks))


class ZeroRedundancy(Candidate):
    """torch's ZeroRedundancyOptimizer over the fused kernel; bf16 parameters are updated as bf16."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        require_processes(workload.device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated")  # its package's own use
            from torch.distributed.optim import ZeroRedundancyOptimizer

        axis = workload.topology.data
        self.gradient = workload.drawn(workload.count())
        flat = workload.drawn(workload.count())
        parameters = [nn.Parameter(piece) for piece in pieces(flat, axis.size)]
        for parameter, gradient in zip(parameters, pieces(self.gradient, axis.size), strict=True):
            parameter.grad = gradient
        self.optimizer = ZeroRedundancyOptimizer(
            parameters,
            optimizer_class=getattr(torch.optim, workload.optimizer),
            process_group=axis.group,
            fused=True,
            **OPTIMIZERS[workload.optimizer],
        )

    def step(self) -> None:
        average(self.gradient, self.workload.topology)
        self.optimizer.step()


class DeepSpeed(Candidate):
    """DeepSpeed's ZeRO stage 1 over torch's fused kernel. Its engine reduces gradients in the backward: not timed."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        require_processes(workload.device)
        os.environ.setdefault("DS_ACCELERATOR", workload.device.type)
        os.environ.setdefault("LOCAL_RANK", "0")  # it asks for a launcher's
        with quiet():
            import deepspeed

            flat = workload.drawn(workload.count())
            self.module = Weighted(pieces(flat, workload.topology.data.size))
            del flat
            self.gradients = pieces(workload.drawn(workload.count()), workload.topology.data.size)
            config: dict[str, Any] = {
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": 1, "reduce_bucket_size": workload.count()},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "bf16": {"enabled": workload.low_precision},
                "steps_per_print": 10**9,
            }
            optimizer = workload.build(list(self.module.parameters()), fused=True)
            self.engine, *_ = deepspeed.initialize(
                model=self.module, optimizer=optimizer, config=config, dist_init_required=False
            )
        self.has_master = True

    def prepare(self) -> None:
        self.engine.backward(self.engine(self.gradients))

    def step(self) -> None:
        self.engine.step()

    def close(self) -> None:
        self.engine.destroy()


class Weighted(nn.Module):
    """A module whose loss has given gradients: the sum of all elements times those."""

    def __init__(self, pieces: list[Tensor]) -> None:
        super().__init__()
        self.pieces = nn.ParameterList(pieces)

    def forward(self, gradients: list[Tensor]) -> Tensor:
        products = zip(self.pieces, gradients, strict=True)
        return torch.stack([torch.dot(piece, gradient) for piece, gradient in products]).sum()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of DeepSpeed's logger; what it prints goes to stderr."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logging.disable(before)


if __name__ == "__main__":
    main(sys.argv[1:])
