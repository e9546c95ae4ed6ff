"""One training run for the comparison, in a process of its own or on the ranks of a layout."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_tex.moe import auxiliary_loss
from lightning_tex.parallel.initialization import materialise
from lightning_tex.recipe import quiet
from lightning_tex.strategy import TexMoEStrategy
from lightning_tex.testing.batches import BatchCollector, Batches, feed, slice_of
from lightning_tex.testing.layouts import Run
from lightning_tex.testing.recording import Record, Recorder, watched
from lightning_tex.testing.sliced_capacity import decide_overflow_as

# What gloo says where another rank has gone.
_LEFT = ("losed by peer", "reset by peer")

BuildOptimizer = Callable[[Any], Optimizer]


def sgd(parameters: Any) -> Optimizer:
    """Plain gradient descent: a gradient of the wrong scale shows in the parameters, which Adam would hide."""
    return torch.optim.SGD(parameters, lr=0.01)


@dataclass
class Job:
    """What is trained in every run.

    Args:
        build: makes the module and its data anew: a LightningDataModule, a loader, or ``None`` for the module's own.
        steps: optimizer steps.
        precision: the Trainer's.
        optimizer: over the module's parameters; ``None``: the module's ``configure_optimizers``.
        seed: of everything, before the module is built.
    """

    build: Callable[[], tuple[LightningModule, Any]]
    steps: int = 3
    precision: str = "64-true"
    optimizer: BuildOptimizer | None = sgd
    seed: int = 0

    def made(self) -> tuple[LightningModule, Any]:
        """The module and its data, alike in every process."""
        os.environ.pop("PL_GLOBAL_SEED", None)  # or some strategies would seed by it, and others not
        torch.manual_seed(self.seed)
        module, data = self.build()
        if self.optimizer is not None and module.automatic_optimization:
            module.configure_optimizers = MethodType(_configured(self.optimizer), module)  # type: ignore[method-assign]
        torch.manual_seed(self.seed)
        return module, data

    def trainer(self, strategy: Any, devices: int, callbacks: list[Callback]) -> Trainer:
        """A Trainer that does nothing but train."""
        return Trainer(
            accelerator="cpu",
            devices=devices,
            strategy=strategy,
            precision=self.precision,  # type: ignore[arg-type]
            max_steps=self.steps,
            max_epochs=-1,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=True,
        )


def _configured(build: BuildOptimizer) -> Callable[[LightningModule], Optimizer]:
    def configure_optimizers(module: LightningModule) -> Optimizer:
        return build([parameter for parameter in module.parameters() if parameter.requires_grad])

    return configure_optimizers


@dataclass
class Outcome:
    """How a run ended on one rank.

    Args:
        record: what it is compared by.
        error: what was raised, if anything.
        inside: names of the modules whose forward was being run then, outermost first.
        trace: of the error.
        follows: the error says that another rank has gone.
    """

    record: Record = field(default_factory=Record)
    error: str | None = None
    inside: list[str] = field(default_factory=list)
    trace: str = ""
    follows: bool = False


def global_batches(job: Job) -> list[Any]:
    """The batches of the first steps, as the job's own data gives them to one process."""
    with _alone():
        module, data = job.made()
        collector = BatchCollector()
        trainer = job.trainer("auto", 1, [collector])
        _draw_meta_parameters(module, job.seed)
        _fit_own_data(trainer, module, data)
    return collector.batches


def own_batches(job: Job, run: Run) -> list[Any]:
    """The batches that the job's own data gives this rank of a layout."""
    with _alone():
        module, data = job.made()
        collector = BatchCollector()
        _fit_own_data(job.trainer(TexMoEStrategy(**run.strategy), run.devices, [collector]), module, data)
    return collector.batches


def reference(job: Job, batches: Sequence[Any], slices: int) -> Outcome:
    """Plain Lightning in one process, on whole batches.

    Args:
        slices: data ranks as which a capacity decides what overflows.
    """
    with _alone():
        module, data = job.made()
        _draw_meta_parameters(module, job.seed)
        if module.automatic_optimization:
            _collect_auxiliary_losses(module)
        trainer = job.trainer("auto", 1, [])
        return _recorded(trainer, module, data, batches, lambda root: decide_overflow_as(root, slices))


def on_layout(job: Job, batches: Sequence[Any], run: Run) -> Outcome:
    """This rank of a layout, on its slices of the batches."""
    with _alone():
        module, data = job.made()
        trainer = job.trainer(TexMoEStrategy(**run.strategy), run.devices, [])
        share = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        own = [slice_of(batch, share["rank"], share["num_replicas"]) for batch in batches]
        return _recorded(trainer, module, data, own, lambda root: None)


class _Watch(Callback):
    """Prepares a module when training begins, and watches its forwards from then on."""

    def __init__(self, record: Record, prepare: Callable[[nn.Module], None]) -> None:
        self.record, self.prepare = record, prepare
        self.running: list[str] = []
        self.hooks = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.prepare(pl_module)
        self.running = self.hooks.enter_context(watched(pl_module, self.record))


def _recorded(
    trainer: Trainer,
    module: LightningModule,
    data: Any,
    batches: Sequence[Any],
    prepare: Callable[[nn.Module], None],
) -> Outcome:
    recorder = Recorder()
    watch = _Watch(recorder.record, prepare)
    trainer.callbacks += [watch, recorder]  # type: ignore[attr-defined]
    with watch.hooks:
        try:
            feed(trainer, module, data, batches)
        except Exception as error:
            follows = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LEFT)
            text = f"{type(error).__name__}: {error}"
            return Outcome(recorder.record, text, list(watch.running), traceback.format_exc(), follows)
    return Outcome(recorder.record)


@contextmanager
def _alone() -> Iterator[None]:
    """Without what Lightning says about every Trainer, and without warnings, which are about training well."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _fit_own_data(trainer: Trainer, module: LightningModule, data: Any) -> None:
    if data is None or hasattr(data, "train_dataloader"):
        trainer.fit(module, datamodule=data)
    else:  # in a list Lightning would see several loaders
        loader = data if isinstance(data, DataLoader) else Batches(data).loader()
        trainer.fit(module, train_dataloaders=loader)


def _draw_meta_parameters(module: LightningModule, seed: int) -> None:
    """Let a module that is built on the meta device get its values as the strategy would draw them."""
    configure = module.configure_model

    def configure_model(self: LightningModule) -> None:
        configure()
        if any(parameter.is_meta for parameter in self.parameters()):
            materialise(self, torch.device("cpu"), seed)

    module.configure_model = MethodType(configure_model, module)  # type: ignore[method-assign]


def _collect_auxiliary_losses(module: LightningModule) -> None:
    """Add the routing losses that the module does not collect itself, as the strategy does."""
    step = module.training_step

    def training_step(self: LightningModule, *args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        if isinstance(output, Tensor):
            return output + auxiliary_loss(self)
        if isinstance(output, dict) and "loss" in output:
            return {**output, "loss": output["loss"] + auxiliary_loss(self)}
        return output

    module.training_step = MethodType(training_step, module)  # type: ignore[method-assign]
