"""What a run did, where it lies and how to go on: printed when training ends."""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console

from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.sharding import parameter_shardings


class RunSummary(Callback):
    """Print a closing summary: what was trained, on which layout, how well, where it lies, how to resume.

    With a language model and a text data module it also compares the validation loss with a unigram model's on the
    same held-out tokens and prints a short generated sample.

    Args:
        sample_tokens: tokens to generate, as far as the model has positions for them; 0: no sample.
        prompt: text the sample continues.
        temperature: of the sampling.
    """

    def __init__(self, sample_tokens: int = 48, prompt: str = "def ", temperature: float = 0.7) -> None:
        self.sample_tokens, self.prompt, self.temperature = sample_tokens, prompt, temperature
        self._started = 0.0
        self._rows: list[tuple[str, str]] = []
        self._sampled = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Sampling needs all ranks and the model on its devices; printing waits until the progress bar is gone.
        self._rows = [
            ("model", f"{type(pl_module).__name__}, {_parameters(trainer, pl_module)}"),
            ("layout", _layout(trainer)),
            ("trained", f"{trainer.global_step} optimizer steps in {time.perf_counter() - self._started:.0f} s"),
        ]
        self._sampled = self._sample(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        if trainer.progress_bar_callback is not None:  # rich's is drawn until then, and once more at the end
            trainer.progress_bar_callback.teardown(trainer, pl_module, "fit")
        rows = [
            *self._rows,
            *_skipped(trainer),
            *_losses(trainer),
            *_places(trainer),
            *_resuming(trainer),
        ]
        _print([*rows, *([("sample", self._sampled)] if self._sampled else [])])

    def _sample(self, trainer: Trainer, module: LightningModule) -> str:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if self.sample_tokens == 0 or not hasattr(module, "generate") or not hasattr(data, "decode"):
            return ""
        ids = torch.tensor([data.encode(self.prompt)], device=module.device)
        positions = getattr(getattr(module, "config", None), "max_sequence_length", math.inf)
        tokens = max(0, min(self.sample_tokens, positions - ids.shape[1]))
        try:
            with trainer.precision_plugin.forward_context():
                return data.decode(module.generate(ids, tokens, self.temperature)[0].tolist())  # type: ignore[operator]
        except UserValueError as error:  # a router that needs a batch
            return f"none: {error}"


def _print(rows: Sequence[tuple[str, str]]) -> None:
    """Print a heading and names beside texts. Lines stay lines, however narrow the terminal: they are copied."""
    console = Console(markup=False, highlight=False)
    width = max(len(name) for name, _ in rows)
    console.print("\nTraining finished", style="italic")
    for name, text in rows:
        first, *others = text.splitlines()
        console.print(f"  {name:{width}}", style="bold", end="  ")
        console.print(first, soft_wrap=True)
        for line in others:
            console.print(" " * (width + 4) + line, soft_wrap=True)


def _parameters(trainer: Trainer, module: LightningModule) -> str:
    """How many there are, whole, and of how many some are trained."""
    topology = getattr(trainer.strategy, "topology", None)
    parameters = dict(module.named_parameters())
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    if topology is not None:
        sizes = {name: prod(one.box.full) for name, one in parameter_shardings(module, topology).items()}
    total, trained = sum(sizes.values()), sum(n for name, n in sizes.items() if parameters[name].requires_grad)
    return f"{total:,} parameters" + ("" if trained == total else f", of which {trained:,} are trained")


def _layout(trainer: Trainer) -> str:
    topology = getattr(trainer.strategy, "topology", None)
    if topology is None:
        return f"{trainer.world_size} rank(s), {type(trainer.strategy).__name__}"
    ranks, dense, experts = str(topology.layout).split(" = ")
    return f"{ranks} = {dense}\n{' ' * len(ranks)} = {experts}"


def _skipped(trainer: Trainer) -> list[tuple[str, str]]:
    optimizer = getattr(trainer.strategy, "stepped", None)  # another strategy than TexMoEStrategy has none
    if optimizer is None or not optimizer.skipped.total:
        return []
    return [("skipped", f"{optimizer.skipped.total} optimizer steps with an infinite or NaN gradient")]


def _losses(trainer: Trainer) -> list[tuple[str, str]]:
    metrics = trainer.callback_metrics
    rows = []
    if "train_loss" in metrics:
        rows.append(("train loss", f"{metrics['train_loss']:.3f} nats per token"))
    if "val_loss" in metrics:
        text = f"{metrics['val_loss']:.3f} nats per token, perplexity {metrics['val_loss'].exp():.1f}"
        rows.append(("validation loss", text))
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        unigram = data.unigram_loss() if hasattr(data, "unigram_loss") else None
        if unigram is not None:
            better = unigram - float(metrics["val_loss"])
            rows.append(("unigram loss", f"{unigram:.3f} nats per token there: the model is {better:.2f} better"))
    return rows


def _places(trainer: Trainer) -> list[tuple[str, str]]:
    rows = []
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            saved = (("best checkpoint", callback.best_model_path), ("last checkpoint", callback.last_model_path))
            rows += [(name, _shown(path)) for name, path in saved if path]
    return rows + [("logs", _shown(logger.log_dir)) for logger in trainer.loggers[:1] if logger.log_dir]


def _shown(path: str | Path) -> str:
    """Relative to the working folder, where it is below that."""
    return os.path.relpath(path) if Path(path).absolute().is_relative_to(Path.cwd()) else str(path)


def _resuming(trainer: Trainer) -> list[tuple[str, str]]:
    """How to go on from what this run saved; nothing where it saved no whole state."""
    saved = _saved_state(trainer)
    if saved is None:
        return []
    path = _shown(saved)
    program = Path(sys.argv[0]).name
    if program not in ("lightning-tex", "__main__.py"):
        limits = "".join(f", after Trainer({name}={limit})" for name, limit in _larger_limit(trainer))
        return [("resume", f"trainer.fit(model, data, ckpt_path={path!r}){limits}")]
    words = [*_without_option(sys.argv[1:], "--ckpt_path"), "--ckpt_path", path]
    for name, limit in _larger_limit(trainer):
        words += [f"--trainer.{name}", str(limit)]  # a later word wins
    name = "lightning-tex" if program == "lightning-tex" else "python -m lightning_tex"
    return [("resume", f"{name} {shlex.join(words)}")]


def _saved_state(trainer: Trainer) -> Path | None:
    newest_saved_here = getattr(trainer.strategy, "newest_saved_here", None)
    if newest_saved_here is not None:
        saved: Path | None = newest_saved_here()
        return saved
    # Another strategy than TexMoEStrategy: what Lightning's callbacks say they saved.
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and not c.save_weights_only]
    paths = [Path(path) for c in callbacks for path in (c.last_model_path, c.best_model_path) if path]
    return next((path for path in paths if path.exists()), None)


def _larger_limit(trainer: Trainer) -> list[tuple[str, int]]:
    """The option without which a resumed run would find nothing left to do."""
    if trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps:
        return [("max_steps", 2 * trainer.max_steps)]
    if trainer.max_epochs and 0 < trainer.max_epochs <= trainer.current_epoch:
        return [("max_epochs", trainer.max_epochs + 1)]
    return []


def _without_option(words: Sequence[str], option: str) -> list[str]:
    """The words but for this option and its value, ``--option value`` or ``--option=value``."""
    kept, skip = [], False
    for word in words:
        if not skip and word != option and not word.startswith(f"{option}="):
            kept.append(word)
        skip = word == option
    return kept
