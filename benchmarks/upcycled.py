"""Loss of a model whose experts are copies of a dense parent's MLPs, beside the same model trained anew.

    python benchmarks/upcycled.py --parent_steps 200 --steps 100

A dense Llama of about the quickstart's width is trained on the quickstart's corpus and upcycled to a Mixtral of 4
experts, 2 a token. That and one of random weights then take the same steps on the same samples, in one process. Printed
are losses on held-out blocks, in nats per token, with the parent's beside them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import lightning as L
import torch

from lightning_tex import LanguageModel, TextDataModule
from lightning_tex.models import DecoderConfig
from lightning_tex.models.upcycling import upcycle

VOCABULARY, LENGTH, BATCH = 2048, 128, 8
DENSE = DecoderConfig(
    VOCABULARY, dim=128, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=256, max_sequence_length=LENGTH,
    activation="swiglu", tie_embeddings=False,
)  # fmt: skip


class Trained(LanguageModel):
    """Trained by AdamW at a rate that rises for some steps and stays."""

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
        rising = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rising, "interval": "step"}}

    def configure_callbacks(self) -> list[L.Callback]:
        return []


def losses(model: LanguageModel, steps: int, every: int, seed: int) -> list[float]:
    """Train; the loss on held-out blocks before the first step and after each ``every``."""
    data = TextDataModule(sequence_length=LENGTH, global_batch_size=BATCH, vocab_size=VOCABULARY, seed=seed)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, strategy="auto", max_steps=steps, val_check_interval=every, limit_val_batches=20,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, inference_mode=False,
    )  # fmt: skip
    found: list[float] = []

    class Losses(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            found.append(float(trainer.callback_metrics["val_loss"]))

    trainer.callbacks.append(Losses())
    trainer.validate(model, data, verbose=False)
    trainer.fit(model, data)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("parent_steps", 200), ("steps", 100), ("every", 25)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    L.seed_everything(0, verbose=False)
    parent = Trained(DENSE)
    last = losses(parent, options.parent_steps, options.parent_steps, seed=1)[-1]
    with tempfile.TemporaryDirectory() as folder:
        parent.save_pretrained(Path(folder) / "dense")
        upcycle(Path(folder) / "dense", Path(folder) / "experts", num_experts=4, top_k=2)
        upcycled = Trained.from_pretrained(Path(folder) / "experts")
        runs = {"upcycled": upcycled, "anew": Trained(upcycled.config)}
        by_run = {name: losses(model, options.steps, options.every, seed=2) for name, model in runs.items()}
    print(f"the dense parent after {options.parent_steps} steps: {last:.3f}")
    steps = range(0, options.steps + 1, options.every)
    print("steps     " + "".join(f"{step:8}" for step in steps))
    for name, every in by_run.items():
        print(f"{name:10}" + "".join(f"{loss:8.3f}" for loss in every))


if __name__ == "__main__":
    main()
