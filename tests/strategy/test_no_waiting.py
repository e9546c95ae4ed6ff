"""A fit as a GPU runs it, on the CPU: no step keeps the host waiting, and what is told of it later is right."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.checkpoint_runs import Data
from helpers.host_reads import HostRead, host_reads
from helpers.nonfinite_runs import Spoilt
from helpers.ranks import on_ranks
from helpers.trainers import quiet, silence
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_tex import LanguageModel, TexMoEStrategy
from lightning_tex.callbacks import LateProgress
from lightning_tex.layers import ColumnParallelLinear, RowParallelLinear
from lightning_tex.models import DecoderConfig
from lightning_tex.parallel.device import pretend_device

STEPS = 7
# What is read there lies on the host: a few numbers of the step before, and what ranks vote.
ON_THE_HOST = ("parallel/host_copy.py:", "resilience/vote.py:")


class Plain(L.LightningModule):
    """Everything a step may have, but for layers that wait themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = ColumnParallelLinear(8, 16), nn.LayerNorm(16), RowParallelLinear(16, 8)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.down(self.norm(self.up(batch))).float().square().mean()
        self.log("train_loss", self.trainer.strategy.reduce(loss.detach().clone()))
        return loss

    def configure_callbacks(self) -> list[L.Callback]:
        return [LateProgress(["train_loss"])]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Counts(L.Callback):
    """Counts reads from the start of one batch to the end of a later one."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.reads: list[HostRead] = []
        self.shown: list[float | None] = []
        self._counting = ExitStack()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.shown.append(trainer.progress_bar_metrics.get("train_loss"))
        if batch_idx == self.first:
            self.reads = self._counting.enter_context(host_reads())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.last:
            self._counting.close()


def language_model(recomputation: str | None, capacity_factor: float | None) -> list[HostRead]:
    """All of a language model's fit, its MoE layers and the library's callbacks included."""
    counts = Counts(2, STEPS - 1)
    sizes = {"dim": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "max_sequence_length": 16}
    experts = {"num_experts": 4, "top_k": 2, "capacity_factor": capacity_factor}
    trainer = quiet(
        strategy=TexMoEStrategy(compile=False, activation_checkpointing=recomputation),
        precision="bf16-mixed",
        max_epochs=1,
        gradient_clip_val=1.0,
        enable_progress_bar=True,
        log_every_n_steps=50,
        callbacks=[counts, TQDMProgressBar(refresh_rate=1)],
    )
    ids = torch.randint(0, 61, (STEPS, 2, 17), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": block[:, :-1], "labels": block[:, 1:]} for block in ids]
    with pretend_device("cuda"):
        trainer.fit(
            LanguageModel(DecoderConfig(vocab_size=61, **sizes, **experts)), DataLoader(batches, batch_size=None)
        )
    # Ids and targets are looked at on the CPU only.
    on_the_host = (*ON_THE_HOST, "data/token_ids.py:", "layers/vocab.py:")
    return [read for read in counts.reads if not read.place.startswith(on_the_host)]


@pytest.mark.parametrize(
    ("recomputation", "capacity_factor"), [(None, 1.25), ("full", None), ("communication_aware", None)]
)
def test_no_step_of_a_language_model_waits(recomputation: str | None, capacity_factor: float | None) -> None:
    assert on_ranks(1, language_model, recomputation, capacity_factor) == [[]]


def counted(world: int, precision: str, clip: str, accumulate: int) -> tuple[list[HostRead], list[float | None], int]:
    counts = Counts(2, STEPS - 1)
    flags: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        flags = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    trainer = quiet(
        devices=world,
        strategy=TexMoEStrategy(compile=False, check_replicas_every_n_steps=0),
        max_epochs=1,
        use_distributed_sampler=False,
        gradient_clip_val=0.1,
        gradient_clip_algorithm=clip,
        accumulate_grad_batches=accumulate,
        enable_progress_bar=True,
        callbacks=[counts, TQDMProgressBar(refresh_rate=1)],
        **flags,
    )
    batches = torch.randn(STEPS, 4, 8, generator=torch.Generator().manual_seed(0))
    with pretend_device("cuda"):
        trainer.fit(Plain(), DataLoader(batches, batch_size=None))
    reads = [read for read in counts.reads if not read.place.startswith(ON_THE_HOST)]
    return reads, counts.shown, trainer.strategy.tiled_optimizer.skipped.total


@pytest.mark.parametrize(
    ("world", "precision", "clip", "accumulate"),
    [
        (1, "32-true", "norm", 1),
        (1, "bf16-mixed", "value", 1),
        (1, "16-mixed", "norm", 1),
        (2, "bf16-mixed", "norm", 2),
    ],
)
def test_guard_and_clip_and_progress_bar_wait_for_nothing(
    world: int, precision: str, clip: str, accumulate: int
) -> None:
    for reads, shown, skipped in on_ranks(world, counted, world, precision, clip, accumulate):
        assert not reads and skipped == 0
        assert shown[0] is None and all(isinstance(value, float) for value in shown[1:])


def spoilt(folder: str, late: bool, what: str, first: int, last: int, most: int) -> dict[str, Any]:
    silence()
    module = Spoilt(what, 0, first, last)
    strategy = TexMoEStrategy(compile=False, check_replicas_every_n_steps=0, max_skipped_steps=most)
    callbacks = [ModelCheckpoint(folder, "{step}", every_n_train_steps=100, save_last=False)]
    trainer = quiet(
        strategy=strategy,
        max_steps=9,
        max_epochs=-1,
        gradient_clip_val=1.0,
        callbacks=callbacks,
        num_sanity_val_steps=0,
    )
    said = None
    with ExitStack() as stack:
        if late:
            stack.enter_context(pretend_device("cuda"))
        try:
            trainer.fit(module, Data())
        except RuntimeError as error:
            said = str(error)
    values = {name: p.detach().clone() for name, p in module.named_parameters()}
    skipped = strategy.tiled_optimizer.skipped
    return {"said": said, "skipped": skipped, "values": values, "losses": module.losses}


@pytest.mark.parametrize(("what", "last", "most"), [("activation", 3, 5), ("expert", 99, 3), ("loss", 99, 1)])
def test_what_the_device_decides_is_what_the_host_would_have(
    what: str, last: int, most: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told = []
    for late in (False, True):
        (found,) = on_ranks(1, spoilt, str(tmp_path / str(late)), late, what, 2, last, most)
        steps = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lightning_tex: step")]
        told.append((found, [line.split()[2] for line in steps]))
    (at_once, numbers), (later, late_numbers) = told
    assert late_numbers == numbers and later["skipped"] == at_once["skipped"]
    for name, value in at_once["values"].items():
        torch.testing.assert_close(later["values"][name], value, rtol=1e-6, atol=1e-7, equal_nan=True)
    assert (at_once["said"] is None) == (later["said"] is None)
    if later["said"] is not None:
        step = 2 + most
        assert f"in step {step} it was first" in later["said"], later["said"]
        # Watched from a step later on; with one step only there is no time to watch.
        assert (tmp_path / "True" / f"nonfinite-step={step}").is_dir()
        assert (
            later["said"].split(" it was first ")[1].split(";")[0]
            == at_once["said"].split(" it was first ")[1].split(";")[0]
        )
