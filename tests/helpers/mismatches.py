"""Fits in which one rank has something else than the others, one after the other on the same ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_tex as tex
from helpers.behaviour_modules import batches, loader, own_slices
from helpers.stopwatch import Elapsed, Stopwatch
from helpers.trainers import quiet
from lightning_tex.errors import UserError
from lightning_tex.layers import (
    ParallelAttention,
    RMSNorm,
    VocabParallelCrossEntropy,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from lightning_tex.moe import MoE


class Small(L.LightningModule):
    """A module whose every part can be given another option.

    Args:
        options: see the attributes.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        given = {"top_k": 2, "capacity": 2.0, "balance": 0.01, "dropout": 0.0, "eps": 1e-5, "attention": 0.0} | options
        self._given = given
        self.embedding, self.norm = VocabParallelEmbedding(61, 16), given.get("norm", RMSNorm)(16, eps=given["eps"])
        self.attention = ParallelAttention(16, 4, dropout=given["attention"])
        self.moe = MoE(16, 16, 4, given["top_k"], given["capacity"], load_balance_coefficient=given["balance"])
        self.dropout, self.loss = nn.Dropout(given["dropout"]), VocabParallelCrossEntropy()
        self.head = VocabParallelHead(16, given.get("vocab_size", 61))
        self.mix = given.get("mix", nn.Linear)(16, 16)
        self.head.weight.requires_grad_(not given.get("frozen", False))
        self.temperature = given.get("temperature", 1.0)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = self.mix(self.norm(x + self.attention(x) + self.moe(x)))
        return self.head(self.dropout(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(self(batch[0]), batch[1])
        for name in self._given.get("logs", ()):
            self.log(name, loss.detach(), sync_dist=True)
        for name in self._given.get("epoch_logs", ()):
            self.log(name, loss.detach(), sync_dist=True, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = self.loss(self(batch[0]), batch[1])
        for name in self._given.get("validation_logs", ()):
            self.log(name, loss, sync_dist=True)

    def configure_optimizers(self) -> Any:
        kind = self._given.get("optimizer", torch.optim.AdamW)
        optimizer = kind(self._given.get("groups", list)(self.parameters()), lr=self._given.get("lr", 0.1))
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=self._given.get("gamma", 0.5))
        return [optimizer], [{"scheduler": schedule, "interval": self._given.get("interval", "epoch")}]


class OwnNorm(RMSNorm):
    """A layer that extends one of this package's."""


class Mixing(nn.Linear):
    """A linear layer of one's own."""


def two_groups(parameters: Any) -> list[dict[str, Any]]:
    first, *others = parameters
    return [{"params": others}, {"params": [first], "weight_decay": 0.5}]


class Own(L.LightningDataModule):
    """Says what ranks must have alike."""

    def __init__(self, examples: int) -> None:
        super().__init__()
        self.examples = examples

    def alike_on_all_ranks(self) -> dict[str, Any]:
        return {"examples": self.examples}

    def train_dataloader(self) -> DataLoader:
        return loader(batches(self.examples))


@dataclass
class Run:
    """What a fit is made of.

    Args:
        strategy, trainer, module: options.
        environment: variables, set meanwhile.
        data: makes a data module, in place of the usual loaders.
        before: is called first; gives back what undoes it.
        stage: the Trainer's method.
        ckpt_path: for it.
    """

    strategy: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    module: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    data: Callable[[], Any] | None = None
    before: Callable[[], Callable[[], None]] | None = None
    stage: str = "fit"
    ckpt_path: str | None = None


@dataclass
class Mismatch:
    """A run of which one rank has a changed one, and words of the error.

    Args:
        odd: what the last rank has.
        words: all in the error, on every rank.
        common: what the others have.
    """

    odd: Run
    words: tuple[str, ...]
    common: Run = field(default_factory=Run)


def prepared(run: Run) -> tuple[L.Trainer, Callable[[], Any]]:
    """The run's Trainer, and what starts it."""
    strategy = tex.TexMoEStrategy(**{"timeout": timedelta(seconds=15), **run.strategy})
    options = {"max_epochs": 1, "use_distributed_sampler": False, "num_sanity_val_steps": 0, **run.trainer}
    trainer = quiet(devices=int(os.environ["WORLD_SIZE"]), strategy=strategy, **options)
    stage, module = getattr(trainer, run.stage), Small(**run.module)
    if run.data is not None:
        return trainer, partial(stage, module, datamodule=run.data())
    loaders = [loader(own_slices(trainer, batches(3))) for _ in range(2 if run.stage == "fit" else 1)]
    return trainer, partial(stage, module, *loaders, ckpt_path=run.ckpt_path)


@contextmanager
def circumstances(run: Run) -> Any:
    kept = dict(os.environ)
    os.environ.update(run.environment)
    undo = run.before() if run.before is not None else None
    try:
        yield
    finally:
        if undo is not None:
            undo()
        os.environ.clear()
        os.environ.update(kept)


def what_was_said(mismatches: dict[str, Mismatch]) -> dict[str, tuple[str, Elapsed]]:
    """Every error of this rank, by case, and the time until it."""
    odd_one = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    said = {}
    for name, mismatch in mismatches.items():
        run = mismatch.odd if odd_one else mismatch.common
        text = "nothing was raised"
        with circumstances(run):
            _, start = prepared(run)
            watch = Stopwatch()
            try:
                start()
            except UserError as error:
                text = str(error)
            said[name] = text, watch.elapsed()
    return said


def default_dtype() -> Callable[[], None]:
    torch.set_default_dtype(torch.float64)
    return lambda: torch.set_default_dtype(torch.float32)


def deterministic() -> Callable[[], None]:
    torch.use_deterministic_algorithms(True)
    return lambda: torch.use_deterministic_algorithms(False)


def high_precision() -> Callable[[], None]:
    torch.set_float32_matmul_precision("high")
    return lambda: torch.set_float32_matmul_precision("highest")


TENSOR = {"tensor_parallel_size": 2}
CHECKPOINTS = {"save_top_k": 0, "dirpath": "/tmp", "filename": "never"}

# The last of two ranks has another option of the strategy.
STRATEGY = {
    "tensor size": Mismatch(Run(TENSOR), ("tensor_parallel_size is 2 on rank 1 and 1 on rank 0",)),
    "expert size": Mismatch(
        Run({"expert_parallel_size": 1}), ("expert_parallel_size is 1 on rank 1 and 'auto' on rank 0",)
    ),
    "expert_tensor size": Mismatch(
        Run({**TENSOR, "expert_tensor_parallel_size": 1}),
        ("expert_tensor_parallel_size is 1 on rank 1 and None on rank 0",),
        Run(TENSOR),
    ),
    "zero_stage": Mismatch(Run({"zero_stage": 0}), ("zero_stage is 0 on rank 1 and 1 on rank 0",)),
    "duplicate_token_dropping": Mismatch(
        Run({**TENSOR, "duplicate_token_dropping": False}),
        ("duplicate_token_dropping is False on rank 1 and True on rank 0",),
        Run(TENSOR),
    ),
    "sequence_parallel": Mismatch(
        Run({**TENSOR, "sequence_parallel": True}),
        ("sequence_parallel is True on rank 1 and False on rank 0",),
        Run(TENSOR),
    ),
    "recomputation": Mismatch(
        Run({"activation_checkpointing": "full", "activation_checkpointing_policy": {MoE}}),
        ("activation_checkpointing is 'full' on rank 1 and None on rank 0", "activation_checkpointing_policy"),
    ),
    "max_skipped_steps": Mismatch(Run({"max_skipped_steps": None}), ("max_skipped_steps is None on rank 1",)),
    "plain checkpoints": Mismatch(
        Run({"save_distributed_checkpoint": False}), ("save_distributed_checkpoint is False on rank 1",)
    ),
    "tile_size": Mismatch(Run({"tile_size": 7}), ("tile_size is 7 on rank 1 and None on rank 0",)),
}

# .. another option of the Trainer, another seed, flag, variable or stage.
TRAINER = {
    "accumulation": Mismatch(
        Run(trainer={"accumulate_grad_batches": 3}), ("the Trainer's accumulate_grad_batches is 3 on rank 1 and 1",)
    ),
    "clipping": Mismatch(Run(trainer={"gradient_clip_val": 1.0}), ("gradient_clip_val is 1.0 on rank 1 and None",)),
    "steps": Mismatch(Run(trainer={"max_steps": 1}), ("the Trainer's max_steps is 1 on rank 1 and -1 on rank 0",)),
    "precision": Mismatch(Run(trainer={"precision": "64-true"}), ("precision is '64-true' on rank 1",)),
    "validation interval": Mismatch(
        Run(trainer={"val_check_interval": 1}), ("val_check_interval is 1 on rank 1 and 1.0 on rank 0",)
    ),
    "validation interval as a time": Mismatch(
        Run(trainer={"val_check_interval": {"hours": 1}}),
        ("the Trainer's val_check_time_interval is 3600.0 on rank 1 and 7200.0 on rank 0",),
        Run(trainer={"val_check_interval": {"hours": 2}}),
    ),
    "callback": Mismatch(
        Run(trainer={"callbacks": [EarlyStopping("x")]}),
        ("the callback EarlyStopping is there on rank 1 and not there on rank 0",),
    ),
    "callback option": Mismatch(
        Run(trainer={"callbacks": [ModelCheckpoint(**CHECKPOINTS, every_n_train_steps=2)]}),
        ("ModelCheckpoint.every_n_train_steps is 2 on rank 1 and 0 on rank 0",),
        Run(trainer={"callbacks": [ModelCheckpoint(**CHECKPOINTS)]}),
    ),
    "seed": Mismatch(
        Run(environment={"PL_GLOBAL_SEED": "2"}),
        ("the seed (seed_everything, PL_GLOBAL_SEED) is 2 on rank 1 and 1 on rank 0",),
        Run(environment={"PL_GLOBAL_SEED": "1"}),
    ),
    "environment": Mismatch(
        Run(environment={"NCCL_ALGO": "Ring"}), ("the environment's NCCL_ALGO is Ring on rank 1 and not set on rank 0",)
    ),
    "default dtype": Mismatch(
        Run(before=default_dtype, trainer={"precision": "64-true"}),
        ("torch.get_default_dtype() is torch.float64 on rank 1",),
        Run(trainer={"precision": "64-true"}),
    ),
    "deterministic": Mismatch(Run(before=deterministic), ("are_deterministic_algorithms_enabled() is True on rank 1",)),
    "matmul precision": Mismatch(Run(before=high_precision), ("fp32_precision is", "on rank 1")),
    "checkpoint": Mismatch(
        Run(ckpt_path="/tmp/of_one_rank"),
        ("ckpt_path is a path on rank 1 and None on rank 0",),
    ),
    "stage": Mismatch(
        Run(stage="validate"),
        ("not in the same place", "the start of trainer.validate on rank 1", "the start of trainer.fit on rank 0"),
    ),
}

# .. another model.
MODEL = {
    "vocabulary": Mismatch(
        Run(module={"vocab_size": 64}),
        ("different models", "head.weight is (64, 16) torch.float32 on rank 1 and (61, 16) torch.float32 on rank 0"),
    ),
    "top_k": Mismatch(Run(module={"top_k": 1}), ("moe.top_k is 1 on rank 1 and 2 on rank 0", "moe.router.top_k")),
    "capacity": Mismatch(Run(module={"capacity": 1.0}), ("moe.capacity_factor is 1.0 on rank 1 and 2.0 on rank 0",)),
    "load-balance coefficient": Mismatch(
        Run(module={"balance": 0.1}), ("moe.load_balance_coefficient is 0.1 on rank 1 and 0.01 on rank 0",)
    ),
    "dropout": Mismatch(Run(module={"dropout": 0.1}), ("dropout.p is 0.1 on rank 1 and 0.0 on rank 0",)),
    "attention's dropout": Mismatch(Run(module={"attention": 0.1}), ("attention.dropout is 0.1 on rank 1",)),
    "norm": Mismatch(Run(module={"eps": 1e-6}), ("norm.eps is 1e-06 on rank 1 and 1e-05 on rank 0",)),
    "norm of one's own": Mismatch(
        Run(module={"norm": OwnNorm, "eps": 1e-6}),
        ("norm.eps is 1e-06 on rank 1 and 1e-05 on rank 0",),
        Run(module={"norm": OwnNorm}),
    ),
    "class": Mismatch(
        Run(module={"mix": Mixing}),
        ("the class of mix is helpers.mismatches.Mixing on rank 1 and torch.nn.modules.linear.Linear on rank 0",),
    ),
    "frozen": Mismatch(Run(module={"frozen": True}), ("head.weight is (61, 16) torch.float32 frozen on rank 1",)),
}

# .. other data.
DATA = {
    "one's own": Mismatch(
        Run(data=partial(Own, 4)), ("examples is 4 on rank 1 and 3 on rank 0",), Run(data=partial(Own, 3))
    ),
}

# .. another name in the log.
LOGGED = {
    "one name more": Mismatch(
        Run(module={"logs": ["loss", "more"]}),
        ("self.log('more', sync_dist=True) in training_step on rank 1 and the end of a step on rank 0",),
        Run(module={"logs": ["loss"]}),
    ),
    "the only name": Mismatch(
        Run(module={"logs": ["loss"]}), ("self.log('loss', sync_dist=True) in training_step on rank 1",)
    ),
    "another name": Mismatch(
        Run(module={"logs": ["ours"]}),
        ("self.log('ours', sync_dist=True) in training_step on rank 1 and self.log('theirs', sync_dist=True)",),
        Run(module={"logs": ["theirs"]}),
    ),
    "another order over an epoch": Mismatch(
        Run(module={"epoch_logs": ["a", "b"]}),
        ("training_step.a, training_step.b on rank 1 and training_step.b, training_step.a on rank 0",),
        Run(module={"epoch_logs": ["b", "a"]}),
    ),
    "validation": Mismatch(
        Run(module={"validation_logs": ["loss", "more"]}, stage="validate"),
        ("validation_step.loss, validation_step.more on rank 1 and validation_step.loss on rank 0",),
        Run(module={"validation_logs": ["loss"]}, stage="validate"),
    ),
}

# .. another optimizer.
OPTIMIZER = {
    "learning rate": Mismatch(
        Run(module={"lr": 0.2}), ("optimizer 0, group 0: lr is 0.2 on rank 1 and 0.1 on rank 0",)
    ),
    "optimizer class": Mismatch(
        Run(module={"optimizer": torch.optim.Adam}), ("the class of optimizer 0 is torch.optim.adam.Adam on rank 1",)
    ),
    "groups": Mismatch(Run(module={"groups": two_groups}), ("the number of groups of optimizer 0 is 2 on rank 1",)),
    "schedule": Mismatch(Run(module={"gamma": 0.9}), ("scheduler 0's gamma is 0.9 on rank 1 and 0.5 on rank 0",)),
    "interval": Mismatch(Run(module={"interval": "step"}), ("scheduler 0's interval is 'step' on rank 1",)),
}
