"""What Lightning's users do, in a few lines each: the uses that rows of the surface are made of."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch import callbacks as lightnings
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks.throughput_monitor import ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from helpers.surface import BATCHES, Facts, Rows, Small, Use

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


def pruned(use: Use) -> Facts:
    """Masks in training, and zeros in what is saved meanwhile."""
    saving = ModelCheckpoint(str(use.folder / "saved"), "{step}", every_n_train_steps=4, save_top_k=-1)
    # With its lottery ticket Lightning trains the copy that it goes back to, too.
    pruning = lightnings.ModelPruning("l1_unstructured", amount=0.5, use_lottery_ticket_hypothesis=False)
    facts = use.fit(callbacks=[pruning, saving], max_epochs=2)
    module = Small.load_from_checkpoint(use.folder / "saved" / "step=8.ckpt")
    zeros = {f"zeros of {name}": int((p == 0).sum()) for name, p in module.named_parameters()}
    return {**facts, **zeros}


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
