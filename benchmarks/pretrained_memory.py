"""Host memory of a rank while it reads a published model: its peak over the rank's own part, on 4 ranks.

    python benchmarks/pretrained_memory.py
    python benchmarks/pretrained_memory.py --format fp8       # or mxfp4

makes a folder of random weights (more than 1 GB in files: a Mixtral in bf16 or fp8, or a gpt-oss in MXFP4), reads it
on tensor 2 x expert 2 x data 2, and writes it again in 16 bits. Memory is what the kernel counts as resident, libraries
and the Python of before taken off.
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
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_tex import LanguageModel, TexMoEStrategy
from lightning_tex.models import Decoder, DecoderConfig
from lightning_tex.pretrained.folder import CONFIG, INDEX
from lightning_tex.recipe import BARE_TRAINER
from lightning_tex.testing import run_ranks

SIZES: dict[str, Any] = {
    "vocab_size": 32000, "dim": 1024, "num_heads": 16, "num_kv_heads": 4, "hidden_dim": 3072,
    "max_sequence_length": 256, "num_experts": 8, "top_k": 2, "moe_every": 1, "norm_topk_prob": True,
    "tie_embeddings": False,
}  # fmt: skip

LAYERS = {"bf16": 6, "fp8": 12, "mxfp4": 22}  # of more than 1 GB in files

GPT_OSS: dict[str, Any] = {
    "activation": "clamped_swiglu", "attention_sinks": True, "attention_bias": True, "attention_out_bias": True,
    "expert_bias": True, "sliding_window": 128, "router": {"name": "softmax", "init_args": {"bias": True}},
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


def publish(folder: Path, kind: str) -> int:
    """Write the model; bytes of its files."""
    config = DecoderConfig(num_layers=LAYERS[kind], **SIZES, **(GPT_OSS if kind == "mxfp4" else {}))
    model = LanguageModel(config)
    with torch.device("meta"):
        model.decoder = Decoder(model.config)
    model.decoder.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.decoder.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.02)
    model.save_pretrained(folder, dtype="bfloat16", max_shard_size="300MB")
    if kind != "bf16":
        quantise(folder, kind)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def quantise(folder: Path, kind: str) -> None:
    """Weights of another format in the place of a folder's, of the same shapes."""
    weight_map = {}
    for file in sorted(folder.glob("*.safetensors")):
        content = {}
        for name, weight in load_file(file).items():
            content |= (_fp8 if kind == "fp8" else _mxfp4)(name, weight)
        save_file(content, file, {"format": "pt"})
        weight_map |= dict.fromkeys(content, file.name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    given = {"quant_method": kind, **({"weight_block_size": [128, 128]} if kind == "fp8" else {})}
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "quantization_config": given}))


def _fp8(name: str, weight: Tensor) -> dict[str, Tensor]:
    if weight.dim() != 2 or "embed" in name or "lm_head" in name:
        return {name: weight}
    grid = [-(-size // 128) for size in weight.shape]
    return {name: weight.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.full(grid, 0.5)}


def _mxfp4(name: str, weight: Tensor) -> dict[str, Tensor]:
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: weight}
    experts, inner, rows = weight.shape
    blocks = torch.randint(0, 256, (experts, rows, inner // 32, 16), dtype=torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": torch.full(blocks.shape[:-1], 120, dtype=torch.uint8)}


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
    parser.add_argument("--format", choices=["bf16", "fp8", "mxfp4"], default="bf16")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp())
    try:
        (size,) = run_ranks(1, publish, place / "published", options.format)
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
