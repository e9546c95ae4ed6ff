"""Averages of sharded weights: those of one process, on every layout, saved in both forms and resumed from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.cases import in_full
from helpers.checkpoint_runs import Data, Model, fit, largest_difference, trainer
from helpers.ranks import together
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_tex as tex
from lightning_tex.saving.consolidate import consolidated

# Resuming writes on into the folder it resumes from.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch"),
]

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel_size": 2},
    "expert": {"expert_parallel_size": 2},
    "plain": {"tensor_parallel_size": 2, "save_distributed_checkpoint": False},
}
EPOCHS = 3


def averages(kind: str) -> L.Callback:
    if kind == "ema":
        return EMAWeightAveraging(decay=0.7, use_buffers=False)
    return StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1, annealing_epochs=1)


def averaged(kind: str, layout: dict[str, Any] | None, folder: str, resume: str | None = None) -> dict[str, Any]:
    """Epochs of a fit, which validates and saves after each."""
    saves = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    losses = Losses()
    devices = 1 if layout is None else 2
    run = fit(
        layout, devices, EPOCHS, resume, callbacks=[averages(kind), saves, losses], limit_val_batches=2, epoch_steps=2
    )
    return {"weights": run["weights"], "losses": losses.seen[-1:]}


class Losses(L.Callback):
    """Of validations, which the averages are judged by."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.seen.append(float(trainer.callback_metrics["val_loss"]))


@pytest.fixture(scope="module", params=in_full(["ema", "swa"], {"ema"}))
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, Any]]:
    """One process, and the same on ranks, and what goes on there from the end of the second epoch."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    alone = averaged(kind, None, f"{folder}/alone")
    cases: dict[Any, tuple[Any, ...]] = {
        name: (averaged, kind, layout, f"{folder}/{name}") for name, layout in LAYOUTS.items()
    }
    # Each goes on from what another layout has saved, in either form.
    for name, source in {"tensor": "expert", "expert": "plain", "plain": "tensor"}.items():
        path = f"{folder}/{source}/epoch=1.ckpt"
        cases[name, "resumed"] = (averaged, kind, LAYOUTS[name], f"{folder}/resumed {name}", path)
    return kind, folder, {"alone": alone, **together(2, cases)}


def test_they_are_those_of_one_process(runs: tuple[str, Path, dict[str, Any]]) -> None:
    _, _, by_case = runs
    alone = by_case.pop("alone")
    for name, ranks in by_case.items():
        for rank in ranks:
            assert largest_difference(rank["weights"], alone["weights"]) < 1e-5, name
            assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-5), name
    by_case["alone"] = alone


def test_a_checkpoint_has_the_average_and_the_weights_of_training(runs: tuple[str, Path, dict[str, Any]]) -> None:
    kind, folder, _ = runs
    alone = torch.load(folder / "alone" / "epoch=1.ckpt", weights_only=True)
    saved = {"expert": consolidated(folder / "expert" / "epoch=1.ckpt")}
    saved["plain"] = torch.load(folder / "plain" / "epoch=1.ckpt", weights_only=True)
    for checkpoint in saved.values():
        for found, expected in zip(weight_sets(kind, checkpoint), weight_sets(kind, alone), strict=True):
            assert largest_difference(trained(found), trained(expected)) < 1e-5
    average, current = map(trained, weight_sets(kind, alone))
    assert largest_difference(average, current) > 1e-4


def weight_sets(kind: str, checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Average, and what is trained."""
    if kind == "ema":
        return checkpoint["state_dict"], checkpoint["current_model_state"]
    state = next(state for name, state in checkpoint["callbacks"].items() if name.startswith("Stochastic"))
    return state["average_model_state"], checkpoint["state_dict"]


def trained(weights: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in weights.items() if value.is_floating_point()}


def test_16_bit_parameters_would_round_an_average() -> None:
    run = trainer(tex.TexMoEStrategy(), 1, precision="bf16-mixed", callbacks=[EMAWeightAveraging()])
    said = r"EMAWeightAveraging is not supported with precision='bf16-mixed'.*legal"
    with pytest.raises(MisconfigurationException, match=said):
        run.fit(Model(), Data())
