"""A fit on a GPU does not keep the host waiting in any step, guard, clipping, progress bar and logging included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.on_a_gpu import ACCELERATOR, NoWaiting, one_rank
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

import lightning_tex as tex
from lightning_tex.models import DecoderConfig


class Blocks(torch.utils.data.Dataset):
    """Blocks of text that is easy to learn."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = (torch.arange(17) * 3 + index) % 61
        return {"input_ids": ids[:-1], "labels": ids[1:]}


def model(**sizes: Any) -> tex.LanguageModel:
    config = {"dim": 32, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "max_sequence_length": 32, **sizes}
    return tex.LanguageModel(DecoderConfig(vocab_size=61, **config))


MODELS = {
    "dense": {},
    "dropless": {"num_experts": 4, "top_k": 2},
    "capacity": {"num_experts": 4, "top_k": 2, "capacity_factor": 1.25},
}


@pytest.mark.parametrize(
    ("sizes", "precision"),
    [("dense", "32-true"), ("dense", "16-mixed"), *((sizes, "bf16-mixed") for sizes in MODELS)],
)
def test_no_step_waits(sizes: str, precision: str, tmp_path: Path) -> None:
    watching = NoWaiting(3, 6)
    bar = RichProgressBar() if precision == "32-true" else TQDMProgressBar(refresh_rate=1)
    trainer = one_rank(
        ACCELERATOR,
        precision=precision,
        max_steps=8,
        gradient_clip_val=1.0,
        accumulate_grad_batches=1,
        enable_progress_bar=True,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=50,
        callbacks=[watching, bar],
        default_root_dir=tmp_path,
    )
    loader = torch.utils.data.DataLoader(Blocks(), batch_size=4, pin_memory=ACCELERATOR == "gpu")
    trainer.fit(model(**MODELS[sizes]), loader)
    assert watching.watched == 4
    assert not watching.waits, f"{len(watching.waits)} waits in 4 steps, the first: {watching.waits[:8]}"
    assert trainer.strategy.tiled_optimizer.skipped.total == 0


@pytest.mark.parametrize("mode", ["full", "communication_aware"])
def test_recomputation_does_not_wait_either(mode: str, tmp_path: Path) -> None:
    watching = NoWaiting(3, 4)
    trainer = one_rank(
        ACCELERATOR,
        {"activation_checkpointing": mode},
        precision="bf16-mixed",
        max_steps=6,
        callbacks=[watching],
        default_root_dir=tmp_path,
    )
    loader = torch.utils.data.DataLoader(Blocks(), batch_size=4, pin_memory=ACCELERATOR == "gpu")
    trainer.fit(model(**MODELS["dropless"]), loader)
    assert watching.watched == 2
    assert not watching.waits, f"{len(watching.waits)} waits in 2 steps, the first: {watching.waits[:8]}"
