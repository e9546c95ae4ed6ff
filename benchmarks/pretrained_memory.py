"""Host memory of a rank while it reads a published model: its peak over the rank's own part, on 4 ranks.

    python benchmarks/pretrained_memory.py

makes a folder of random weights (a Mixtral of more than 1 GB in bf16), reads it on tensor 2 x expert 2 x data 2, and
writes it again. Memory is what the kernel counts as resident, libraries and the Python of before taken off.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning import Callback
from torch.utils.data import DataLoader

from lightning_tex import LanguageModel, TexMoEStrategy
from lightning_tex.models import Decoder, DecoderConfig
from lightning_tex.recipe import BARE_TRAINER
from lightning_tex.testing import run_ranks

SIZES: dict[str, Any] = {
    "vocab_size": 32000, "dim": 1024, "num_layers": 6, "num_heads": 16, "num_kv_heads": 4, "hidden_dim": 3072,
    "max_sequence_length": 256, "num_experts": 8, "top_k": 2, "moe_every": 1, "norm_topk_prob": True,
    "tie_embeddings": False,
}  # fmt: skip


def resident(entry: str) -> int:
    """Bytes by ``/proc/self/status``: VmRSS, now; VmHWM, the highest since it was forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:"))


def forget_peak() -> int:
    """Begin to look for a new peak; what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


class Measured(Callback):
    """Notes the peak when weights have been read, before the first batch."""

    def __init__(self) -> None:
        self.before = self.peak = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.before = forget_peak()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.peak = self.peak or resident("VmHWM")


def publish(folder: Path) -> int:
    """Write the model; bytes of its files."""
    model = LanguageModel(DecoderConfig(**SIZES))
    with torch.device("meta"):
        model.decoder = Decoder(model.config)
    model.decoder.to_empty(device="cpu")
    for parameter in model.decoder.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.02)
    model.save_pretrained(folder, dtype="bfloat16", max_shard_size="300MB")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def load(folder: Path, precision: str, out: Path) -> dict[str, float]:
    """Read the folder as one of 4 ranks, and write it again; bytes."""
    measured = Measured()
    strategy = TexMoEStrategy(tensor_parallel_size=2, expert_parallel_size=2)
    options = {**BARE_TRAINER, "callbacks": [measured], "precision": precision, "limit_val_batches": 1}
    trainer = L.Trainer(accelerator="cpu", devices=4, strategy=strategy, **options)
    model = LanguageModel.from_pretrained(folder)
    rows = [{"input_ids": torch.arange(16), "labels": torch.arange(16)}] * 4
    trainer.validate(model, DataLoader(rows, batch_size=1), verbose=False)  # type: ignore[arg-type]
    own = sum(parameter.nbytes for parameter in {id(p): p for p in model.parameters()}.values())
    before = forget_peak()
    model.save_pretrained(out)
    return {
        "own_bytes": own,
        "loading_bytes": measured.peak - measured.before,
        "read_bytes": model.pretrained.read_bytes if model.pretrained else 0,
        "saving_bytes": resident("VmHWM") - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--precisions", nargs="+", default=["bf16-true", "32-true"])
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp())
    try:
        (size,) = run_ranks(1, publish, place / "published")
        print(f"{size / 1e9:.2f} GB in files")
        for precision in options.precisions:
            ranks = run_ranks(4, load, place / "published", precision, place / f"again-{precision}")
            print(json.dumps({"precision": precision, "ranks": ranks}))
            worst = max(rank["loading_bytes"] / rank["own_bytes"] for rank in ranks)
            more = max(rank["saving_bytes"] for rank in ranks)
            print(
                f"{precision}: loading takes {worst:.3f} of a rank's own part, saving {more / 2**20:.0f} MiB beside it"
            )
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
