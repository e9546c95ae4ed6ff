"""Whole fits on a GPU give the losses of the same fit on the CPU, in every precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.checkpoint_runs import Data, Model
from helpers.on_a_gpu import ACCELERATOR, one_rank
from helpers.trainers import gathered

import lightning_tex as tex
from lightning_tex.callbacks import RunSummary
from lightning_tex.models import DecoderConfig

STEPS = 4
# Of a loss, relative: routers may break a near tie otherwise where products are rounded to 16 bits.
TOLERANCE = {"64-true": 1e-9, "32-true": 1e-4, "bf16-mixed": 0.03, "bf16-true": 0.05, "16-mixed": 0.01}
# What it is compared with on the CPU, where Lightning has no 16-mixed.
ON_CPU = {precision: precision for precision in TOLERANCE} | {"16-mixed": "32-true"}


class Descends(Model):
    """By SGD: Adam would hide a wrong scale."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def fit(
    accelerator: str, precision: str, **strategy: Any
) -> tuple[list[float], dict[str, torch.Tensor], tuple[int, int]]:
    """Losses, parameters, and the numbers of steps skipped and done."""
    module = Descends()
    trainer = one_rank(
        accelerator, strategy, precision=precision, max_steps=STEPS, max_epochs=-1, gradient_clip_val=0.5
    )
    trainer.fit(module, Data(STEPS))
    skipped = trainer.strategy.tiled_optimizer.skipped
    values = {name: value.double().cpu() for name, value in gathered(module, trainer).items()}
    return module.losses, values, (skipped.total, trainer.global_step)


@pytest.mark.parametrize("precision", TOLERANCE)
def test_losses_are_those_of_the_cpu(precision: str) -> None:
    expected, theirs, _ = fit("cpu", ON_CPU[precision])
    found, ours, counts = fit(ACCELERATOR, precision)
    assert counts == (0, STEPS), f"(skipped, steps) = {counts}"
    for loss, other in zip(found, expected, strict=True):
        assert abs(loss / other - 1) <= TOLERANCE[precision], f"losses in {precision}: {found}, on the CPU {expected}"
    if precision in ("64-true", "32-true"):
        far = {
            name: float((ours[name] - value).norm() / value.norm().clamp(min=1e-12))
            for name, value in theirs.items()
            if not torch.allclose(ours[name], value, rtol=100 * TOLERANCE[precision], atol=TOLERANCE[precision])
        }
        assert not far, f"parameters after {STEPS} steps, relative differences: {far}"


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_every_stage_of_zero_gives_the_same(zero_stage: int) -> None:
    expected, _, _ = fit(ACCELERATOR, "bf16-mixed")
    found, _, _ = fit(ACCELERATOR, "bf16-mixed", zero_stage=zero_stage)
    assert found == pytest.approx(expected, rel=1e-2)


class Tokens(torch.utils.data.Dataset):
    """A few blocks, whose next token follows from the last one."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(17) * 3 + index) % 61
        return {"input_ids": ids[:-1], "labels": ids[1:]}


class Generates(tex.LanguageModel):
    """A small one that continues a prompt when training ends."""

    def __init__(self) -> None:
        sizes = {"dim": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "max_sequence_length": 32}
        super().__init__(DecoderConfig(vocab_size=61, num_experts=4, top_k=2, **sizes))

    def on_train_end(self) -> None:
        prompt = torch.tensor([[1, 4, 7]], device=self.device)
        self.generated = self.generate(prompt, 5, temperature=0.7)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_language_model_trains_validates_and_generates(precision: str, tmp_path: Any) -> None:
    losses = {}
    for accelerator in ("cpu", ACCELERATOR):
        torch.manual_seed(0)
        module = Generates()
        trainer = one_rank(
            accelerator,
            precision=precision,
            max_steps=6,
            max_epochs=-1,
            limit_val_batches=1,
            val_check_interval=2,
            check_val_every_n_epoch=None,
            gradient_clip_val=1.0,
            callbacks=[RunSummary()],
            default_root_dir=tmp_path,
        )
        loader = torch.utils.data.DataLoader(Tokens(), batch_size=4)
        trainer.fit(module, loader, loader)
        losses[accelerator] = float(trainer.callback_metrics["train_loss"]), float(trainer.callback_metrics["val_loss"])
        assert module.generated.shape == (1, 8)
        assert module.generated.device.type == {"cpu": "cpu", "gpu": "cuda"}[accelerator]
    for found, expected in zip(losses[ACCELERATOR], losses["cpu"], strict=True):
        assert abs(found / expected - 1) <= TOLERANCE[precision], f"(train, validation) losses: {losses}"
