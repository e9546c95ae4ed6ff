"""A recipe small enough to be launched many times, and what its runs leave behind."""

from __future__ import annotations

import csv
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import datasets  # noqa: F401  (once here, not in every forked rank)
import yaml
from lightning import Callback, LightningModule, Trainer

from lightning_tex.cli import main

WORDS = ["tensor", "expert", "data", "token", "route", "gate", "the", "of", "to", "a"]
VOCABULARY = 300
# Words of a command that runs it on fewer processes.
ON_ONE = tuple(
    f"--trainer.{option}=1"
    for option in ("devices", "strategy.init_args.tensor_parallel_size", "strategy.init_args.expert_parallel_size")
)
ON_TWO = ("--trainer.devices", "2", "--trainer.strategy.init_args.expert_parallel_size", "1")


class Probe(Callback):
    """Write down what the command line made of its options; give it as ``--trainer.callbacks+=tiny_recipe.Probe``."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = trainer.global_step

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        optimizer: Any = trainer.optimizers[0]
        found = {
            "strategy": type(trainer.strategy).__name__,
            "optimizer": type(getattr(optimizer, "inner", optimizer)).__name__,
            "lr": optimizer.param_groups[0]["lr"],
            "vocabulary": pl_module.config.vocab_size,
            "first_step": self._first_step,
            "last_step": trainer.global_step,
            "last_loss": trainer.callback_metrics["train_loss"].item(),
        }
        Path("probe.json").write_text(json.dumps(found))


def write_recipe(folder: Path) -> Path:
    """A folder of text and a recipe over it: tensor 2 x expert 2 x data 2, four steps."""
    text = folder / "text"
    text.mkdir()
    for i in range(20):
        words = (WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(60))
        (text / f"{i:02d}.txt").write_text(f"Document {i}\n" + " ".join(words) + "\n")
    recipe = {
        "seed_everything": 7,
        "trainer": {
            "accelerator": "cpu",
            "devices": 4,
            "strategy": {
                "class_path": "lightning_tex.TexMoEStrategy",
                "init_args": {"tensor_parallel_size": 2, "expert_parallel_size": 2},
            },
            "max_steps": 4,
            "limit_val_batches": 0,
            "log_every_n_steps": 1,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "."}},
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"dirpath": "checkpoints", "save_last": True},
                }
            ],
        },
        "model": {
            "class_path": "lightning_tex.LanguageModel",
            "init_args": {
                "config": {"dim": 16, "num_layers": 2, "num_heads": 2, "max_sequence_length": 32, "num_experts": 2}
            },
        },
        "data": {
            "class_path": "lightning_tex.TextDataModule",
            "init_args": {
                "path": str(text),
                "vocab_size": VOCABULARY,
                "sequence_length": 32,
                "global_batch_size": 4,
                "cache_dir": str(folder / "cache"),
            },
        },
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def fit(folder: Path, recipe: Path, *options: str) -> None:
    """``lightning-tex fit`` in this process, as if started in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    sys.argv = ["lightning-tex"]
    sys.path.insert(0, str(Path(__file__).parent))
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
    main(["fit", "--config", str(recipe), *options])


def losses(folder: Path) -> list[float]:
    """``train_loss`` of every step of the last run in ``folder``."""
    latest = max(folder.rglob("metrics.csv"), key=lambda path: path.stat().st_mtime)
    with latest.open() as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file) if row.get("train_loss")]


def probed(folder: Path) -> dict[str, Any]:
    """What :class:`Probe` found in the last run in ``folder``."""
    return json.loads((folder / "probe.json").read_text())
