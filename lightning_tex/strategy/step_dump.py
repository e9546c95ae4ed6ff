"""A step that went wrong, on disk: the state before it, every data rank's batches, and how to build the run again."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import pickle
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from lightning import LightningDataModule, LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_tex.parallel.errors import UserFileError, UserTypeError

if TYPE_CHECKING:
    from lightning_tex.strategy.checkpointing import CheckpointingStrategy

# A dump's folder; the number of optimizer steps follows.
DUMPED = "nonfinite-step="
_ABOUT, _STATE, _RECIPE, _HPARAMS = "about.json", "state.ckpt", "recipe.yaml", "hparams.pt"


_OF_A_RECIPE = ("seed_everything", "trainer", "model", "data", "optimizer", "lr_scheduler")


@dataclass(frozen=True)
class KeptBatch:
    """A batch, and its index in the epoch."""

    batch: Any
    index: int


@dataclass(frozen=True)
class KeptStep:
    """The batches of a step on this rank, and the random states before the first one."""

    batches: list[KeptBatch] = field(default_factory=list)
    random: dict[str, Tensor] = field(default_factory=dict)


def write_dump(
    strategy: CheckpointingStrategy, trainer: Trainer, path: Path, kept: KeptStep, said: str, step: int
) -> None:
    """Write the state, which a skipped step has left as it was, and the step's batches; collective.

    Args:
        path: the folder; one that is there is replaced.
        kept: of this rank.
        said: what went wrong.
        step: the step's number; the Trainer may have gone on since.
    """
    topology = strategy.topology
    # Collective: the Trainer asks rank 0 for it.
    log_dir = trainer.log_dir if trainer.loggers else trainer.default_root_dir
    if strategy.is_global_zero:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        _write_about(strategy, trainer, path, said, step, Path(log_dir or ".", "config.yaml"))
    strategy.barrier()
    if topology.tensor.rank == 0:
        batches = [apply_to_collection(each.batch, Tensor, lambda t: t.detach().cpu()) for each in kept.batches]
        indices = [each.index for each in kept.batches]
        torch.save(
            {"batches": batches, "indices": indices, "random": kept.random}, path / _of_data_rank(topology.data.rank)
        )
    strategy.save_complete(trainer, path / _STATE)


def _write_about(
    strategy: CheckpointingStrategy, trainer: Trainer, path: Path, said: str, step: int, recipe: Path
) -> None:
    module: Any = trainer.lightning_module
    if recipe.is_file():
        run = yaml.safe_load(recipe.read_text())
        # The rest are arguments of the command, such as ckpt_path.
        (path / _RECIPE).write_text(yaml.safe_dump({name: run[name] for name in _OF_A_RECIPE if name in run}))
    cls = type(module)
    about = {
        "said": said,
        "step": step,
        "steps_done": trainer.global_step,
        "world": strategy.topology.layout.world,
        "strategy": _options(strategy),
        "precision": str(strategy.precision_plugin.precision),
        "accelerator": "cpu" if strategy.root_device.type == "cpu" else "gpu",
        "num_nodes": trainer.num_nodes,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "module": {"name": cls.__qualname__, "import": cls.__module__, "file": inspect.getsourcefile(cls)},
    }
    (path / _ABOUT).write_text(json.dumps(about, indent=2))
    torch.save(dict(module.hparams), path / _HPARAMS)


def _options(strategy: Any) -> dict[str, Any]:
    """The arguments of a TexMoEStrategy that decide what a step does."""
    layout, config = strategy.topology.layout, strategy.tiled_optimizer.state_config
    return {
        "tensor_parallel_size": layout.tensor,
        "expert_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor,
        "sequence_parallel": strategy.communication.sequence_parallel,
        "duplicate_token_dropping": strategy.communication.duplicate_token_dropping,
        "expert_chunks": strategy.communication.expert_chunks,
        "zero_stage": config.zero_stage,
        "optimizer_state_format": config.optimizer_state_format,
        "activation_checkpointing": strategy.options.activation_checkpointing,
    }


def _of_data_rank(rank: int) -> str:
    return f"data-rank={rank}.pt"


@dataclass(frozen=True)
class Dump:
    """A dump that is there.

    Args:
        path: its folder.
        about: what the run was.
        unpickles: classes other than tensors and plain containers, which can run any code.
    """

    path: Path
    about: dict[str, Any]
    unpickles: bool = False

    @classmethod
    def read(cls, path: Path, unpickles: bool = False) -> Dump:
        """Open one.

        Raises:
            FileNotFoundError: there is none, or it was cut off.
        """
        missing = [name for name in (_ABOUT, _STATE) if not (path / name).exists()]
        if missing:
            raise UserFileError(f"{path} is no dump of a step: it has no {', '.join(missing)}")
        return cls(path, json.loads((path / _ABOUT).read_text()), unpickles)

    @property
    def state(self) -> Path:
        """The checkpoint of before the step."""
        return self.path / _STATE

    @property
    def recipe(self) -> Path | None:
        """The run's configuration, if it was run from one."""
        path = self.path / _RECIPE
        return path if path.is_file() else None

    def module(self) -> LightningModule:
        """The run's module, built from its hyperparameters.

        Raises:
            TypeError: it cannot be built of them.
        """
        about = self.about["module"]
        source = _imported(about["import"], about["file"])
        cls: Any = source
        for name in about["name"].split("."):
            cls = getattr(cls, name)
        hparams = self._loaded(_HPARAMS)
        taken = inspect.signature(cls).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
            hparams = {name: value for name, value in hparams.items() if name in taken}  # as load_from_checkpoint does
        try:
            module: LightningModule = cls(**hparams)
        except TypeError as error:
            raise UserTypeError(
                f"{about['name']} is not built from what it saved: {error}; legal: self.save_hyperparameters() in its "
                "__init__, or a run from a recipe"
            ) from error
        return module

    def data(self) -> KeptBatches:
        """The step's batches as a data module."""
        return KeptBatches(self)

    def random(self, data_rank: int) -> dict[str, Tensor]:
        """The random states of before the step."""
        streams: dict[str, Tensor] = self._of(data_rank)["random"]
        return streams

    def indices(self, data_rank: int) -> list[int]:
        """The batches' places in the epoch."""
        kept: list[int] = self._of(data_rank)["indices"]
        return kept

    def batches(self, data_rank: int) -> list[Any]:
        """A data rank's batches, in their order."""
        kept: list[Any] = self._of(data_rank)["batches"]
        return kept

    def _of(self, data_rank: int) -> dict[str, Any]:
        return self._loaded(_of_data_rank(data_rank))

    def _loaded(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            loaded: dict[str, Any] = torch.load(path, weights_only=not self.unpickles)
        except pickle.UnpicklingError as error:
            kind = re.search(r"GLOBAL (\S+)", str(error))
            raise UserTypeError(
                f"{path} holds {kind[1] if kind else 'objects'}, and unpickling classes runs code; legal for a dump of "
                "your own: --unpickle"
            ) from None
        return loaded


def _imported(name: str, file: str | None) -> Any:
    if name != "__main__":
        return importlib.import_module(name)
    spec = None if file is None else importlib.util.spec_from_file_location("replayed_script", file)
    if spec is None or spec.loader is None:
        raise UserTypeError("the run's module was defined in no file; legal: a module that can be imported")
    script = sys.modules["replayed_script"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


class KeptBatches(LightningDataModule):
    """The batches of a dumped step, over and over: how many a step takes is the Trainer's business."""

    def __init__(self, dump: Dump) -> None:
        super().__init__()
        self._dump = dump

    def train_dataloader(self) -> DataLoader[Any]:
        share: Any = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return DataLoader(_Repeated(self._dump.batches(share["rank"] if share else 0)), batch_size=None)


class _Repeated(IterableDataset[Any]):
    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.batches
