"""A run that was stopped within an epoch goes on with the next sample, and as if undisturbed, on any other layout."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets  # noqa: F401  (once here, not in every forked rank)
import lightning as L
import pytest
import torch
from helpers.trainers import gathered, quiet
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_tex import LanguageModel, TexMoEStrategy
from lightning_tex.data import TextDataModule
from lightning_tex.models import DecoderConfig
from lightning_tex.testing.ranks import run_ranks

EPOCH = 5  # steps
EPOCHS = 3
STOP = EPOCH + 2

TED = {"tensor_parallel_size": 2, "expert_parallel_size": 2}
OTHERS: dict[str, tuple[int, dict[str, Any]]] = {
    "expert 4": (4, {"tensor_parallel_size": 1, "expert_parallel_size": 4}),
    "folding": (4, {"tensor_parallel_size": 2, "expert_tensor_parallel_size": 1, "expert_parallel_size": 4}),
    "one process": (1, {}),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]


class Reader(LanguageModel):
    """Remembers what it read and how well it knew it."""

    def __init__(self) -> None:
        super().__init__(
            DecoderConfig(
                vocab_size=300,
                dim=16,
                num_layers=2,
                num_heads=4,
                hidden_dim=16,
                max_sequence_length=72,
                num_experts=4,
                top_k=2,
            )
        )
        self.samples: list[list[int]] = []
        self.losses: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.samples.append(batch["sample"].tolist())
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        # The default eps of 1e-8 would let rounding decide the direction of elements whose gradient is nearly 0.
        return torch.optim.AdamW(self.parameters(), lr=3e-3, eps=1e-6)


def fit(
    data: TextDataModule, devices: int, layout: dict[str, Any], seed: int, ckpt_path: Path | None = None, **how: Any
) -> dict[str, Any]:
    """Train on this rank; losses of the global batches, this data rank's samples, whole weights."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(seed, verbose=False)
    module = Reader()
    strategy = TexMoEStrategy(**layout)
    trainer = quiet(devices=devices, strategy=strategy, limit_val_batches=0, num_sanity_val_steps=0, **how)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return {
        "data rank": trainer.distributed_sampler_kwargs["rank"],
        "samples": module.samples,
        "losses": trainer.strategy.reduce(torch.stack(module.losses), reduce_op="mean").double(),
        "weights": gathered(module, trainer),
    }


def undisturbed_and_stopped(make: Any, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    whole = fit(make(), 4, TED, 7, max_epochs=EPOCHS)
    saver = ModelCheckpoint(path.parent, path.stem, every_n_train_steps=STOP)
    return whole, fit(make(), 4, TED, 7, max_steps=STOP, callbacks=[saver])


def resumed(make: Any, path: Path, devices: int, layout: dict[str, Any]) -> dict[str, Any]:
    return fit(make(), devices, layout, 8, path, max_epochs=EPOCHS)  # another seed: nothing but the checkpoint helps


def global_samples(ranks: list[dict[str, Any]]) -> list[list[int]]:
    """What each step read: the shares of all data ranks, one after the other."""
    share_of = {rank["data rank"]: rank["samples"] for rank in ranks}
    assert all(rank["samples"] == share_of[rank["data rank"]] for rank in ranks), "tensor ranks read differently"
    return [flat(shares) for shares in zip(*(share_of[rank] for rank in sorted(share_of)), strict=True)]


def flat(parts: Iterable[list[int]]) -> list[int]:
    return [sample for part in parts for sample in part]


@pytest.fixture(scope="module")
def stopped_run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("runs")

    def make() -> TextDataModule:
        return TextDataModule(
            str(folder), vocab_size=300, sequence_length=72, global_batch_size=8, cache_dir=str(place / "cache")
        )

    path = place / "checkpoints" / "stopped.ckpt"
    by_rank = run_ranks(4, undisturbed_and_stopped, make, path)
    return make, path, *([rank[i] for rank in by_rank] for i in (0, 1))


@pytest.mark.parametrize("other", OTHERS)
def test_resuming_within_an_epoch_on_another_layout(stopped_run: Any, other: str) -> None:
    make, path, whole, stopped = stopped_run
    devices, layout = OTHERS[other]
    again = run_ranks(devices, resumed, make, path, devices, layout)

    samples = global_samples(whole)
    assert len(samples) == EPOCHS * EPOCH
    assert global_samples(stopped) == samples[:STOP]
    assert global_samples(again) == samples[STOP:]
    second_epoch = flat(global_samples(stopped)[EPOCH:] + global_samples(again)[: 2 * EPOCH - STOP])
    assert len(set(second_epoch)) == 8 * EPOCH, "a sample was read twice within an epoch"

    losses = whole[0]["losses"]
    assert losses[-1] < losses[0] - 0.2, "nothing was learnt"
    for rank in again:
        torch.testing.assert_close(rank["losses"], losses[STOP:], rtol=1e-5, atol=0)
        assert rank["weights"].keys() == whole[0]["weights"].keys()
        for name, expected in whole[0]["weights"].items():
            error = float((rank["weights"][name] - expected).norm() / expected.norm())
            assert error <= 1e-5, f"{name}: {error:.1e}"
