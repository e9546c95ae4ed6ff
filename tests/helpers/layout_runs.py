"""Train one small decoder under a strategy, and record what layouts are compared by."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_tex as tex
from helpers.layout_errors import Record, errors
from helpers.layout_grid import Case, Options, Sizes
from helpers.trainers import gathered, quiet
from lightning_tex.layers import VocabParallelCrossEntropy
from lightning_tex.models import Decoder, DecoderConfig
from lightning_tex.moe import Router, auxiliary_loss
from lightning_tex.moe.experts import Experts
from lightning_tex.testing.sliced_capacity import decide_overflow_as

STEPS = 20
FEWER_STEPS = 4  # where collectives, of four and eight ranks on two cores, take all the time
SAMPLES = 8  # of one micro-step over the whole data axis, whatever its size
LENGTH = 6  # tokens of a sample that are predicted from


class Run(NamedTuple):
    """A case, and how it is trained."""

    case: Case
    precision: str
    steps: int = STEPS  # of the optimizer

    def __str__(self) -> str:
        steps = "" if self.steps == STEPS else f"-{self.steps}steps"
        return f"{self.case}-fp{self.precision[:2]}{steps}"


def small(sizes: Sizes) -> dict[str, int]:
    """One block, with experts, where eight ranks share two cores; else a dense one before it."""
    return {"num_layers": 1, "moe_every": 1} if sizes.world == 8 else {}


def decoder_config(options: Options, **changes: Any) -> DecoderConfig:
    return DecoderConfig(
        **{
            **{
                "vocab_size": 61,
                "dim": 16,
                "num_layers": 2,
                "num_heads": 8,
                "num_kv_heads": 8,
                "hidden_dim": 16,
                "num_experts": 8,
                "top_k": 2 if options.top_2 else 1,
                "capacity_factor": 0.75 if options.capacity else None,
                "activation": "swiglu" if options.swiglu else "gelu",
                "load_balance_coefficient": 0.01,
                "z_loss_coefficient": 0.001 if options.z_loss else 0.0,
                "tie_embeddings": options.tied,
            },
            **changes,
        }
    )


class Recorded(L.LightningModule):
    """A decoder that records every step. ``collect``: it adds the auxiliary loss itself."""

    def __init__(self, config: DecoderConfig, adamw: bool, collect: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.model = Decoder(config)
        self.cross_entropy = VocabParallelCrossEntropy()
        self.adamw, self.collect = adamw, collect
        self.record = Record()
        self.own_gradients: dict[str, list[Tensor]] = {}
        self.pending = 0.0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        ids, targets = batch
        loss = self.cross_entropy(self.model(ids), targets)
        return loss + auxiliary_loss(self) if self.collect else loss

    def on_before_backward(self, loss: Tensor) -> None:
        # Everything that is differentiated: auxiliary losses added, divided by the accumulation.
        self.pending += float(loss)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        record = self.record
        record.losses.append(self.pending)
        self.pending = 0.0
        optimizer = self.trainer.strategy.optimizers[0]
        if hasattr(optimizer, "gradient_norm"):
            record.norms.append(float(optimizer.gradient_norm()))
        else:
            norms = [torch.linalg.vector_norm(p.grad) for p in self.parameters() if p.grad is not None]
            record.norms.append(float(torch.linalg.vector_norm(torch.stack(norms))))
        for name, p in self.named_parameters():
            if p.grad is not None:
                self.own_gradients.setdefault(name, []).append(p.grad.detach().clone())

    def on_train_batch_end(self, *args: Any) -> None:
        for _, layer in self.model.moe_layers():
            taken = layer.load.take()
            self.record.overflowed += int(taken[-1]) if taken is not None else 0

    def on_train_end(self) -> None:
        losses = torch.tensor(self.record.losses, dtype=torch.float64)
        self.record.losses = self.trainer.strategy.reduce(losses, reduce_op="mean").tolist()
        self.record.parameters = gathered(self, self.trainer)
        # Steps as the last dim, which no axis shards: one gather for all of them.
        self.record.gradients = gathered(
            self, self.trainer, {name: torch.stack(g, -1) for name, g in self.own_gradients.items()}
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        if self.adamw:
            # The default eps of 1e-8 would let rounding decide the direction of elements whose gradient is nearly 0.
            return torch.optim.AdamW(self.parameters(), lr=3e-3, eps=1e-6)
        return torch.optim.SGD(self.parameters(), lr=0.03, momentum=0.5)


def token_blocks(samples: int, seed: int = 0) -> TensorDataset:
    """Random tokens, which repeat after two micro-steps so that there is something to learn."""
    ids = torch.randint(0, 61, (2 * SAMPLES, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    ids = ids.repeat(-(-samples // len(ids)), 1)[:samples]
    return TensorDataset(ids[:, :-1], ids[:, 1:])


class Slices:
    """Batch sampler: of every ``samples`` consecutive samples, the ``rank``-th of ``parts`` slices."""

    def __init__(self, total: int, samples: int, parts: int = 1, rank: int = 0) -> None:
        share = samples // parts
        self.batches = [list(range(j + rank * share, j + (rank + 1) * share)) for j in range(0, total, samples)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class SlicedData(L.LightningDataModule):
    """Training batches of ``samples`` samples, of which each data rank sees its slice."""

    def __init__(self, micro_steps: int, samples: int = SAMPLES) -> None:
        super().__init__()
        self.dataset, self.samples = token_blocks(micro_steps * samples), samples

    def train_dataloader(self) -> DataLoader:
        kwargs = getattr(self.trainer.strategy, "distributed_sampler_kwargs", {"num_replicas": 1, "rank": 0})
        sampler = Slices(len(self.dataset), self.samples, kwargs["num_replicas"], kwargs["rank"])
        return DataLoader(self.dataset, batch_sampler=sampler)


def trainer(options: Options, precision: str, devices: int, strategy: Any, **changes: Any) -> L.Trainer:
    accumulate = 2 if options.accumulate else 1
    flags = {
        "devices": devices,
        "strategy": strategy,
        "max_epochs": 1,
        "accumulate_grad_batches": accumulate,
        "gradient_clip_val": 0.5 if options.clip else None,
        "precision": precision,
        "use_distributed_sampler": False,
    }
    return quiet(**{**flags, **changes})


def train_case(run: Run) -> Record:
    """One run on this rank of its world."""
    options, sizes = run.case.options, run.case.sizes
    strategy = tex.TexMoEStrategy(
        tensor_parallel_size=sizes.tensor,
        expert_parallel_size=sizes.expert,
        expert_tensor_parallel_size=sizes.expert_tensor,
        duplicate_token_dropping=options.duplicate_token_dropping,
        expert_chunks=2 if options.chunks else 1,
        tile_size=64 if options.small_tiles else None,
    )
    module = Recorded(decoder_config(options, **small(sizes)), options.adamw, options.collect)
    fit = trainer(options, run.precision, sizes.world, strategy)
    fit.fit(module, SlicedData(run.steps * fit.accumulate_grad_batches))
    return module.record


def train_reference(
    options: Options, slices: int, precision: str, steps: int, changes: tuple[tuple[str, int], ...]
) -> Record:
    """The same in one process without the strategy, whole micro-steps of all data ranks at a time."""
    module = Recorded(decoder_config(options, **dict(changes)), options.adamw, collect=True)
    decide_overflow_as(module, slices)
    fit = trainer(options, precision, 1, "auto")
    fit.fit(module, SlicedData(steps * fit.accumulate_grad_batches))
    return module.record


def errors_of_run(run: Run, reference: Record) -> dict[str, float]:
    """A run of this world: this rank's errors."""
    return errors(train_case(run), reference, kinds(run.case))


def train_references(wanted: list[tuple[Any, ...]]) -> list[Record]:
    """This worker's share of some references."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
        os.environ.pop(name)
    return [train_reference(*each) for each in wanted[rank::world]]


def reference_of(run: Run) -> tuple[Any, ...]:
    """What a run's reference depends on: the arguments of ``train_reference``."""
    options, sizes = run.case.options, run.case.sizes
    slices = sizes.data if options.capacity else 1
    return options.mathematics(), slices, run.precision, run.steps, tuple(small(sizes).items())


def kinds(case: Case) -> dict[str, str]:
    """Parameter name -> dense, norm, router or expert."""
    with torch.device("meta"):
        model = Decoder(decoder_config(case.options, **small(case.sizes)))
    found = {}
    for prefix, module in model.named_modules():
        kind = (
            "expert"
            if isinstance(module, Experts)
            else "router"
            if isinstance(module, Router)
            else "norm"
            if isinstance(module, nn.RMSNorm)
            else "dense"
        )
        found.update({f"model.{prefix}.{own}": kind for own, _ in module.named_parameters(recurse=False)})
    return found
