"""What Lightning's users do, row by row: the list that the table of docs/lightning.md is written from."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch import callbacks as lightnings
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks.on_exception_checkpoint import OnExceptionCheckpoint
from lightning.pytorch.callbacks.throughput_monitor import ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from helpers.surface import BATCHES, Facts, Row, Rows, Small, Use

# --- stages


def evaluate(stage: str, use: Use) -> Facts:
    run, module = use.trainer(), Small()
    (found,) = getattr(run, stage)(module, Rows(), verbose=False)
    return {**use.after(module, run), **found}


def predict(use: Use) -> Facts:
    run, module = use.trainer(), Small()
    predicted = run.predict(module, Rows())
    return {"batches": len(predicted), "columns": predicted[0].shape[1]}


def fit_then_test(use: Use) -> Facts:
    run, module = use.trainer(), Small()
    run.fit(module, Rows())
    (found,) = run.test(module, Rows(), verbose=False)
    return {**use.after(module, run), **found}


def fit_twice(use: Use) -> Facts:
    run, module = use.trainer(), Small()
    run.fit(module, Rows())
    run.fit_loop.max_epochs = 2
    run.fit(module, Rows())
    return use.after(module, run)


def two_trainers(use: Use) -> Facts:
    module = Small()
    use.fit(module)
    return use.fit(module)


# --- loaders


class TwoValidations(Rows):
    def val_dataloader(self) -> list[DataLoader]:
        return [self.loader(2, seed=1), self.loader(1, seed=2)]


class Combined(Rows):
    def train_dataloader(self) -> CombinedLoader:
        return CombinedLoader({"a": self.loader(3), "b": self.loader(2, seed=3)}, "max_size_cycle")


class OfCombined(Small):
    def training_step(self, batch: Any, index: int) -> Tensor:
        return super().training_step(batch["a"], index) + self.loss(batch["b"])


class Stream(IterableDataset[Any]):
    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


class Streamed(Rows):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(Stream(list(self.loader())), batch_size=None)


# --- optimization


class Manual(Small):
    def __init__(self, closure: bool = False) -> None:
        super().__init__()
        self.automatic_optimization, self.closure = False, closure

    def training_step(self, batch: Any, index: int) -> None:
        optimizer: Any = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        if self.closure:
            optimizer.step(closure)
        else:
            closure()
            self.clip_gradients(optimizer, 0.5, "norm")
            optimizer.step()


class Toggled(Small):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.plain, self.experts)]


class Clips(Small):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="value")


class Scheduled(Small):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


class Closing(Small):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


# --- callbacks


class Finetunes(lightnings.BaseFinetuning):
    def freeze_before_training(self, module: Any) -> None:
        self.freeze(module.experts)

    def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.experts, optimizer, lr=0.05)


class Unfrozen(Small):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def saves(use: Use, limit: int = BATCHES, **options: Any) -> Facts:
    callback = ModelCheckpoint(str(use.folder / "saved"), "{epoch}-{step}", **options)
    facts = use.fit(callbacks=[callback], max_epochs=2, limit_train_batches=limit)
    names = sorted(path.name for path in (use.folder / "saved").iterdir() if not path.name.startswith("."))
    return {**facts, "names": names}


class Fails(L.Callback):
    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if index == 2:
            raise ArithmeticError("as was to be shown")


def fails(use: Use, callback: Any) -> Facts:
    with suppress(ArithmeticError):
        use.fit(callbacks=[callback, Fails()], enable_checkpointing=True)
    return {"names": sorted(path.suffix for path in (use.folder / "saved").iterdir() if path.name[0] != ".")}


def with_callback(make: Any, use: Use, **flags: Any) -> Facts:
    return use.fit(callbacks=[make(use)], **flags)


def learning_rate_finder(use: Use) -> Facts:
    finder = lightnings.LearningRateFinder(num_training_steps=4, min_lr=1e-3, max_lr=0.1)
    facts = use.fit(callbacks=[finder])
    return {**facts, "suggested": float(finder.optimal_lr.suggestion() or 0)}


def throughput(use: Use) -> Facts:
    monitor = ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=2)
    return use.fit(callbacks=[monitor], logger=CSVLogger(str(use.folder)), log_every_n_steps=1)


def monitors_rates(use: Use) -> Facts:
    return use.fit(callbacks=[lightnings.LearningRateMonitor()], logger=CSVLogger(str(use.folder)))


def device_stats(use: Use) -> Facts:
    return use.fit(callbacks=[lightnings.DeviceStatsMonitor(cpu_stats=True)], logger=CSVLogger(str(use.folder)))


# --- loggers, launch


def csv(use: Use) -> Facts:
    facts = use.fit(logger=CSVLogger(str(use.folder)), log_every_n_steps=1)
    written = (use.folder / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    return {**facts, "columns": written.splitlines()[0]}


def logs_to(kind: str, use: Use) -> Facts:
    from lightning.pytorch import loggers

    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # its data base has nothing to do with us
    made = {
        "tensorboard": lambda: loggers.TensorBoardLogger(str(use.folder)),
        "wandb": lambda: loggers.WandbLogger(save_dir=str(use.folder), offline=True, project="surface"),
        "mlflow": lambda: loggers.MLFlowLogger(tracking_uri=f"file:{use.folder}/mlruns"),
    }
    return use.fit(logger=made[kind](), log_every_n_steps=1)


SCRIPT = """
    import os
    import sys

    sys.path.insert(0, {tests!r})
    import lightning as L
    import lightning_tex
    from helpers.surface import Rows, Small
    from helpers.trainers import QUIET

    flags = {{"max_epochs": 1, "num_sanity_val_steps": 0, "enable_checkpointing": False, **QUIET}}
    fit = L.Trainer(devices=2, strategy="tex_moe", use_distributed_sampler=False, **flags)
    fit.fit(Small(), Rows())
    said = "rank {{}} of {{}} took {{}} steps\\n".format(fit.global_rank, fit.world_size, fit.global_step)
    os.write(1, said.encode())  # at once, beside the other rank
"""


def without_main_guard(use: Use) -> Facts:
    """Not on ranks: the script starts them."""
    script = use.folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).format(tests=str(Path(__file__).parents[1])))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {"lines": sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))}


def fit(**flags: Any) -> Any:
    return lambda use: use.fit(**flags)


def flagged(module: Any = Small, data: Any = Rows, **flags: Any) -> Any:
    return lambda use: use.fit(module(), data(), **flags)


ROWS = [
    Row("stages", "`fit`", fit()),
    Row("stages", "`validate`", partial(evaluate, "validate")),
    Row("stages", "`test`", partial(evaluate, "test")),
    Row("stages", "`predict`", predict, worlds=(1,), note="of several ranks each has its own samples"),
    Row("stages", "`fit`, then `test`", fit_then_test),
    Row("stages", "`fit` twice with one Trainer", fit_twice),
    Row("stages", "one module in two Trainers", two_trainers),
    Row("Trainer", "`accumulate_grad_batches`", fit(accumulate_grad_batches=2)),
    Row("Trainer", "`limit_train_batches`, `limit_val_batches`", fit(limit_train_batches=3, limit_val_batches=1)),
    Row("Trainer", "`limit_train_batches` as a share", fit(limit_train_batches=0.5)),
    Row("Trainer", "`overfit_batches`", fit(overfit_batches=1, max_epochs=3)),
    Row("Trainer", "`fast_dev_run`", fit(fast_dev_run=True)),
    Row("Trainer", "`val_check_interval`, `check_val_every_n_epoch`", fit(val_check_interval=2, max_epochs=2)),
    Row("Trainer", "`max_steps`, `min_epochs`", fit(max_steps=6, max_epochs=-1)),
    Row("Trainer", "`max_time`", fit(max_time={"hours": 1})),
    Row("Trainer", "`num_sanity_val_steps`", fit(num_sanity_val_steps=1)),
    Row("Trainer", "`reload_dataloaders_every_n_epochs`", fit(reload_dataloaders_every_n_epochs=1, max_epochs=2)),
    Row("Trainer", "`inference_mode=False`", fit(inference_mode=False)),
    Row("Trainer", "`detect_anomaly`", fit(detect_anomaly=True)),
    Row("Trainer", "`deterministic`", fit(deterministic=True)),
    Row("Trainer", "`barebones`", flagged(barebones=True), alike=False),
    Row("Trainer", "`profiler`: simple", fit(profiler="simple")),
    Row("Trainer", "`profiler`: advanced", fit(profiler="advanced")),
    Row("Trainer", "`profiler`: pytorch", fit(profiler="pytorch")),
    Row("Trainer", "`gradient_clip_val`: norm", fit(gradient_clip_val=0.05)),
    Row("Trainer", "`gradient_clip_val`: value", fit(gradient_clip_val=0.01, gradient_clip_algorithm="value")),
    Row("Trainer", "`sync_batchnorm`", fit(sync_batchnorm=True), "Trainer(sync_batchnorm=True) is not supported"),
    Row("Trainer", "`precision`", held_by="tests/strategy/test_precision.py",
        note="32-true, 64-true, bf16-mixed, 16-mixed, bf16-true; others are refused by name"),
    Row("loaders", "several validation loaders", flagged(data=TwoValidations), alike=True),
    Row("loaders", "`CombinedLoader`", flagged(OfCombined, Combined)),
    Row("loaders", "iterable data sets", flagged(data=Streamed)),
    Row("loaders", "ranks with unequal numbers of batches", held_by="tests/strategy/test_uneven_evaluation.py",
        note="of several evaluation loaders refused by name"),
    Row("optimization", "manual", flagged(Manual)),
    Row("optimization", "manual, with closures", flagged(lambda: Manual(closure=True))),
    Row("optimization", "several optimizers, `toggle_optimizer`", flagged(Toggled)),
    Row("optimization", "several optimizers over the same parameters",
        held_by="tests/strategy/test_several_optimizers.py"),
    Row("optimization", "`configure_gradient_clipping`", flagged(Clips)),
    Row("optimization", "schedulers by step and epoch", held_by="tests/strategy/test_optimization.py"),
    Row("optimization", "`ReduceLROnPlateau`", flagged(Scheduled, max_epochs=2)),
    Row("optimization", "LBFGS", flagged(Closing), "optimizer LBFGS calls its closure 2 times in one step"),
    Row("optimization", "a module without TEX layers", flagged(lambda: Small(experts=False)),
        note="data parallel, with optimizer states sharded (ZeRO)"),
    Row("callbacks", "`ModelCheckpoint(monitor=, save_top_k=)`",
        partial(saves, monitor="val_loss", save_top_k=1, save_last=True)),
    Row("callbacks", "`ModelCheckpoint(every_n_train_steps=)`", partial(saves, every_n_train_steps=3, save_top_k=-1)),
    Row("callbacks", "`ModelCheckpoint(train_time_interval=)`",
        partial(saves, train_time_interval=timedelta(0), save_top_k=-1)),
    Row("callbacks", "`ModelCheckpoint(save_weights_only=True)`", partial(saves, save_weights_only=True)),
    Row("callbacks", "`ModelCheckpoint(save_on_train_epoch_end=)`",
        partial(saves, save_on_train_epoch_end=True, every_n_epochs=2)),
    Row("callbacks", "`ModelCheckpoint(save_on_exception=True)`",
        lambda use: fails(use, ModelCheckpoint(str(use.folder / "saved"), save_on_exception=True)), alike=False,
        note="where all ranks raise"),
    Row("callbacks", "`OnExceptionCheckpoint`",
        lambda use: fails(use, OnExceptionCheckpoint(str(use.folder / "saved"))), note="where all ranks raise"),
    Row("callbacks", "`EarlyStopping`",
        partial(with_callback, lambda use: lightnings.EarlyStopping("val_loss", stopping_threshold=9.0), max_epochs=3)),
    Row("callbacks", "`LearningRateMonitor`", monitors_rates),
    Row("callbacks", "`LearningRateFinder`", learning_rate_finder),
    Row("callbacks", "`BatchSizeFinder`",
        partial(with_callback, lambda use: lightnings.BatchSizeFinder(max_trials=1)),
        "The Batch size finder is not supported with distributed strategies", note="by Lightning, as for DDP"),
    Row("callbacks", "`StochasticWeightAveraging`, `WeightAveraging`, `EMAWeightAveraging`",
        held_by="tests/strategy/test_averaging.py", note="refused by name in 16-mixed and bf16-mixed"),
    Row("callbacks", "`GradientAccumulationScheduler`",
        partial(with_callback, lambda use: lightnings.GradientAccumulationScheduler({0: 1, 1: 2}), max_epochs=2)),
    Row("callbacks", "`BaseFinetuning`", flagged(Unfrozen, callbacks=[Finetunes()], max_epochs=2)),
    Row("callbacks", "`ModelPruning`",
        partial(with_callback, lambda use: lightnings.ModelPruning("l1_unstructured", amount=0.5)),
        "callback ModelPruning is not supported by TexMoEStrategy"),
    Row("callbacks", "`ModelSummary`", held_by="tests/strategy/test_what_hooks_see.py", note="global sizes"),
    Row("callbacks", "`DeviceStatsMonitor`", device_stats),
    Row("callbacks", "`Timer`", partial(with_callback, lambda use: lightnings.Timer({"hours": 1}))),
    Row("callbacks", "`TQDMProgressBar`",
        partial(with_callback, lambda use: lightnings.TQDMProgressBar(), enable_progress_bar=True)),
    Row("callbacks", "`RichProgressBar`",
        partial(with_callback, lambda use: lightnings.RichProgressBar(), enable_progress_bar=True)),
    Row("callbacks", "`ThroughputMonitor`", throughput),
    Row("callbacks", "`BasePredictionWriter`", held_by="tests/callbacks/test_predictions.py"),
    Row("loggers", "CSV", csv),
    Row("loggers", "TensorBoard", partial(logs_to, "tensorboard"), needs=("tensorboard",)),
    Row("loggers", "Weights and Biases, offline", partial(logs_to, "wandb"), needs=("wandb",)),
    Row("loggers", "MLflow, in local files", partial(logs_to, "mlflow"), needs=("mlflow",)),
    Row("launch", "a script without a main guard", without_main_guard, worlds=(), alike=False),
    Row("launch", "notebooks: several processes", refused="starts its 2 processes by running the script again",
        held_by="tests/strategy/test_errors.py", note="`devices=1` works there"),
    Row("launch", "`torchrun`, SLURM", held_by="tests/cli/test_launchers.py"),
    Row("checkpoints", "`ckpt_path`: a path, `last`, `best`", held_by="tests/strategy/test_ckpt_path.py"),
    Row("checkpoints", "URLs", held_by="tests/saving/test_remote_runs.py"),
    Row("checkpoints", "a `CheckpointIO` of the user's, with directories",
        held_by="tests/saving/test_lightning.py", refused="writes single files",
        note="works with `save_distributed_checkpoint=False`"),
    Row("checkpoints", "`save_checkpoint(storage_options=)`", held_by="tests/saving/test_lightning.py",
        refused="TexMoEStrategy.save_checkpoint(storage_options=...)"),
]  # fmt: skip
