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
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_tex.moe import auxiliary_loss
from lightning_tex.parallel.errors import left_by_another_rank
from lightning_tex.parallel.initialization import materialise
from lightning_tex.recipe import quiet
from lightning_tex.strategy import TexMoEStrategy
from lightning_tex.testing.batches import BatchCollector, Batches, feed, slice_of
from lightning_tex.testing.layouts import Run
from lightning_tex.testing.ranks import RanksFailed, run_ranks
from lightning_tex.testing.recording import Record, Recorder, watched
from lightning_tex.testing.sliced_capacity import decide_overflow_as

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
        seed: of torch, NumPy and ``random``, before the module is built and again before it trains.
    """

    build: Callable[[], tuple[LightningModule, Any]]
    steps: int = 3
    precision: str = "64-true"
    optimizer: BuildOptimizer | None = sgd
    seed: int = 0

    def made(self) -> tuple[LightningModule, Any]:
        """The module and its data, alike in every process."""
        _seed(self.seed)
        module, data = self.build()
        if self.optimizer is not None and module.automatic_optimization:
            module.configure_optimizers = MethodType(_configured(self.optimizer), module)  # type: ignore[method-assign]
        _seed(self.seed)
        return module, data

    def trainer(self, strategy: Any, devices: int, callbacks: list[Callback], max_epochs: int = -1) -> Trainer:
        """A Trainer that does nothing but train, for ``steps`` optimizer steps or ``max_epochs`` over the data."""
        return Trainer(
            accelerator="cpu",
            devices=devices,
            strategy=strategy,
            precision=self.precision,  # type: ignore[arg-type]
            max_steps=self.steps,
            max_epochs=max_epochs,
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


def _seed(seed: int) -> None:
    seed_everything(seed, verbose=False)
    os.environ.pop("PL_GLOBAL_SEED", None)  # or some strategies would seed by it, and others not


def _configured(build: BuildOptimizer) -> Callable[[LightningModule], Optimizer]:
    def configure_optimizers(module: LightningModule) -> Optimizer:
        return build([parameter for parameter in module.parameters() if parameter.requires_grad])

    return configure_optimizers


@dataclass
class Outcome:
    """How a run ended on one rank.

    Args:
        record: what it is compared by.
        batches: that the job's own data gave.
        steps: optimizer steps that the Trainer counted.
        error: what was raised, if anything.
        inside: names of the modules whose forward was being run then, outermost first.
        trace: of the error.
        follows: the error says that another rank has gone.
    """

    record: Record = field(default_factory=Record)
    batches: list[Any] = field(default_factory=list)
    steps: int = 0
    error: str | None = None
    inside: list[str] = field(default_factory=list)
    trace: str = ""
    follows: bool = False


def outcomes_of(devices: int, function: Callable[..., Outcome], *args: Any, timeout: float) -> list[Outcome]:
    """``function(*args)`` on forked ranks. Where ranks hang or die and no other tells why, one outcome says that."""
    try:
        return run_ranks(devices, function, *args, timeout=timeout)
    except RanksFailed as failure:
        outcomes: list[Outcome] = list(failure.outcomes.values())
        if all(outcome.error is None for outcome in outcomes):
            last = str(failure).splitlines()[-1]
            hang = f"ranks {list(failure.hung)} hang: they still run after {timeout:g} s"
            outcomes.append(Outcome(error=hang if failure.hung else f"a rank ended: {last}", trace=str(failure)))
        return outcomes


def first_told(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome of the rank whose error is a cause and no consequence; any if none has one."""
    return min(outcomes, key=lambda outcome: (outcome.error is None, outcome.follows))


def global_batches(job: Job) -> Outcome:
    """The batches of the first steps, or of one epoch, as the job's own data gives them to one process."""
    return _collected(job, "auto", 1)


def own_batches(job: Job, run: Run) -> Outcome:
    """The batches that the job's own data gives this rank of a layout."""
    return _collected(job, lambda: TexMoEStrategy(**run.strategy), run.devices)


def _collected(job: Job, strategy: str | Callable[[], Any], devices: int) -> Outcome:
    outcome, collector = Outcome(), BatchCollector()
    with _telling(outcome):
        module, data = job.made()
        if strategy == "auto":
            _draw_meta_parameters(module, job.seed)
        made = strategy if isinstance(strategy, str) else strategy()
        trainer = job.trainer(made, devices, [collector], max_epochs=1)
        _fit_own_data(trainer, module, data)
        outcome.batches, outcome.steps = collector.batches, trainer.global_step
    return outcome


def reference(job: Job, batches: Sequence[Any], slices: int) -> Outcome:
    """Plain Lightning in one process, on whole batches.

    Args:
        slices: data ranks as which a capacity decides what overflows.
    """
    outcome = Outcome()
    with _telling(outcome):
        module, data = job.made()
        _draw_meta_parameters(module, job.seed)
        if module.automatic_optimization:
            _collect_auxiliary_losses(module)
        _record(outcome, job.trainer("auto", 1, []), module, data, batches, slices)
    return outcome


def on_layout(job: Job, batches: Sequence[Any], run: Run) -> Outcome:
    """This rank of a layout, on its slices of the batches."""
    outcome = Outcome()
    with _telling(outcome):
        module, data = job.made()
        trainer = job.trainer(TexMoEStrategy(**run.strategy), run.devices, [])
        share = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        own = [slice_of(batch, share["rank"], share["num_replicas"]) for batch in batches]
        _record(outcome, trainer, module, data, own)
    return outcome


class _Watch(Callback):
    """Prepares a module when training begins, and watches its forwards from then on."""

    def __init__(self, outcome: Outcome, slices: int | None) -> None:
        self.outcome, self.slices = outcome, slices
        self.hooks = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.slices is not None:
            decide_overflow_as(pl_module, self.slices)
        self.hooks.enter_context(watched(pl_module, self.outcome.record, self.outcome.inside))


def _record(
    outcome: Outcome,
    trainer: Trainer,
    module: LightningModule,
    data: Any,
    batches: Sequence[Any],
    slices: int | None = None,
) -> None:
    watch = _Watch(outcome, slices)
    trainer.callbacks += [watch, Recorder(outcome.record)]  # type: ignore[attr-defined]
    with watch.hooks:
        feed(trainer, module, data, batches)
    outcome.steps = trainer.global_step


@contextmanager
def _telling(outcome: Outcome) -> Iterator[None]:
    """What is raised inside goes into the outcome."""
    try:
        with _alone():
            yield
    except Exception as error:
        outcome.error, outcome.trace = f"{type(error).__name__}: {error}", traceback.format_exc()
        outcome.follows = left_by_another_rank(error)


@contextmanager
def _alone() -> Iterator[None]:
    """Without what Lightning says about every Trainer, and without warnings, which are about training well."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _fit_own_data(trainer: Trainer, module: LightningModule, data: Any) -> None:
    if has_loader(data):
        trainer.fit(module, datamodule=data)
    else:  # in a list Lightning would see several loaders
        trainer.fit(module, train_dataloaders=data if _are_loaders(data) else Batches(data).loader())


def has_loader(data: Any) -> bool:
    """Whether a job's data is the module's own loader or a data module, which may give ranks what it likes."""
    return data is None or hasattr(data, "train_dataloader")


def _are_loaders(data: Any) -> bool:
    """Whether Lightning knows it as a loader or as several."""
    if isinstance(data, (list, tuple, dict)):
        parts = list(data.values()) if isinstance(data, dict) else data
        return bool(parts) and all(isinstance(part, DataLoader) for part in parts)
    return isinstance(data, (DataLoader, CombinedLoader))


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
