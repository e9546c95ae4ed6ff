"""Whether a long run stays flat: memory, descriptors, threads, processes, shared memory and files, by step.

    python benchmarks/long_run.py --steps 5000 --plot docs/long-run.png

A tiny language model on two ranks, with tensor parallelism, a data loader's worker on each, validation and a save in
the background every ``--every`` steps (the two newest and ``last`` are kept), logged to CSV and, where it is installed,
to TensorBoard. Linux only: counts are those of ``/proc``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

import lightning_tex as tex
from lightning_tex.models import DecoderConfig
from lightning_tex.testing.ranks import run_ranks

COUNTS = ("descriptors", "threads", "processes", "shm", "files")
WARM_UP = 0.2  # of the steps
# KiB a step. Allocators keep what they once took; a tensor of this model leaked in every step would be more.
FLAT_SLOPE = 1.0

Row = dict[str, float]


class Gauge(L.Callback):
    """Writes down, every some steps, what this process holds.

    Args:
        folder: of checkpoints.
        every: steps.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self.rows: list[Row] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step % self.every == 0:  # before the validation and the save of this step
            tex.TexMoEStrategy.of(trainer)._background.wait()  # a save that is under way holds more, for a while
            trainer.strategy.barrier()
            self.rows.append({"step": trainer.global_step, **held(self.folder)})


def held(folder: Path) -> Row:
    """What this process holds: resident MiB, and counts."""
    own = str(os.getpid())
    children = Path("/proc/self/task", own, "children").read_text().split()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    shared = [name for name in os.listdir("/dev/shm") if any(f"_{pid}_" in name for pid in (own, *children))]
    return {
        "rss_mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "processes": len(children),
        "shm": len(shared),
        "files": len(os.listdir(folder)) if folder.exists() else 0,
    }


def loggers(folder: Path) -> list[Logger]:
    """CSV, and TensorBoard where it is installed."""
    made: list[Logger] = [CSVLogger(folder, "csv")]
    with suppress(ModuleNotFoundError):
        made.append(TensorBoardLogger(folder, "tensorboard"))
    return made


def rows_of_a_rank(folder: str, steps: int, every: int, workers: int, ranks: int) -> list[Row]:
    """Train on this rank; what it held, by step."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(1, verbose=False)
    checkpoints = Path(folder, "checkpoints")
    gauge = Gauge(checkpoints, every)
    newest = ModelCheckpoint(
        checkpoints, "{step}", monitor="step", mode="max", save_top_k=2, save_last=True, every_n_train_steps=every
    )
    data = tex.TextDataModule(
        max_bytes=200_000, vocab_size=300, sequence_length=32, global_batch_size=4, num_workers=workers
    )
    config = DecoderConfig(vocab_size=300, dim=16, num_layers=2, num_heads=2, hidden_dim=16, num_experts=4)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=tex.TexMoEStrategy(tensor_parallel_size=min(2, ranks)),
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        limit_val_batches=2,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        logger=loggers(Path(folder)),
        callbacks=[gauge, newest],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(tex.LanguageModel(config), data)
    return gauge.rows


def measured(steps: int, every: int, workers: int, ranks: int, folder: str, timeout: float) -> list[list[Row]]:
    """The rows of every rank.

    Args:
        steps: optimizer steps.
        every: steps between validations, saves and rows.
        workers: of each data loader.
        ranks: processes.
        folder: for checkpoints and logs.
        timeout: seconds.
    """
    return run_ranks(ranks, rows_of_a_rank, folder, steps, every, workers, ranks, timeout=timeout)


def settled(rows: Sequence[Row]) -> Sequence[Row]:
    """Those after the warm-up, in which allocators and the folder of checkpoints fill up."""
    return rows[max(3, int(WARM_UP * len(rows))) :]


def slope_kib(rows: Sequence[Row]) -> float:
    """Least squares of the resident memory over the steps after the warm-up, KiB a step."""
    late = settled(rows)
    return float(np.polyfit([row["step"] for row in late], [row["rss_mib"] for row in late], 1)[0] * 1024)


def grown(rows: Sequence[Row]) -> list[str]:
    """The counts that end above where they began after the warm-up."""
    late = settled(rows)
    half = len(late) // 2
    return [name for name in COUNTS if max(r[name] for r in late[half:]) > max(r[name] for r in late[:half])]


def verdict(rows: Sequence[Row]) -> str:
    """Whether a rank's run was flat, with figures."""
    late, slope, counts = settled(rows), slope_kib(rows), grown(rows)
    flat = not counts and slope < FLAT_SLOPE
    memory = f"memory {late[0]['rss_mib']:.1f} -> {late[-1]['rss_mib']:.1f} MiB, {slope:+.3f} KiB a step"
    counted = ", ".join(f"{name} {late[0][name]:.0f} -> {late[-1][name]:.0f}" for name in COUNTS)
    return f"{'flat' if flat else 'NOT FLAT'} from step {late[0]['step']:.0f} on: {memory}; {counted}"


def plot(by_rank: Sequence[Sequence[Row]], file: str) -> None:
    """Everything over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6), sharex=True)
    for name, axis in zip(("rss_mib", *COUNTS), axes.flat, strict=True):
        for rank, rows in enumerate(by_rank):
            axis.plot([row["step"] for row in rows], [row[name] for row in rows], label=f"rank {rank}")
        axis.set(title=name, ylim=(0, None))
    axes[0, 0].legend()
    figure.savefig(file, bbox_inches="tight", dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print a table of rank 0 and a verdict for each rank; with ``--json`` all rows as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--every", type=int, default=100, help="steps between validations, saves and rows")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="of each data loader")
    parser.add_argument("--timeout", type=float, default=7200, help="seconds")
    parser.add_argument("--plot", help="file for a picture")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        o = options
        by_rank = measured(o.steps, o.every, o.workers, o.ranks, folder, o.timeout)
    columns = ("step", "rss_mib", *COUNTS)
    print("".join(f"{name:>13}" for name in columns))
    for row in itertools.islice(by_rank[0], None, None, max(1, len(by_rank[0]) // 25)):
        print("".join(f"{row[name]:13.1f}" if name == "rss_mib" else f"{row[name]:13.0f}" for name in columns))
    for rank, rows in enumerate(by_rank):
        print(f"rank {rank}: {verdict(rows)}")
    if options.plot:
        plot(by_rank, options.plot)
    if options.json:
        print(json.dumps(by_rank))


if __name__ == "__main__":
    main()
