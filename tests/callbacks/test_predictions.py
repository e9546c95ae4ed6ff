"""Predictions of all ranks come back in the order of samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.ranks import on_ranks
from helpers.trainers import quiet
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_tex as tex
from lightning_tex.callbacks import PredictionWriter, read_predictions
from lightning_tex.layers import ColumnParallelLinear, RowParallelLinear

SAMPLES = torch.arange(28.0).reshape(7, 4)


class Doubles(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = ColumnParallelLinear(4, 4, bias=False), RowParallelLinear(4, 4, bias=False)
        for layer in (self.up, self.down):
            torch.nn.init.eye_(layer.weight)

    def predict_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> Any:
        doubled = 2 * self.down(self.up(batch[0]))
        return {"doubled": doubled, "first": doubled[:, 0]} if dataloader_idx == 0 else doubled.sum()


def predict(folder: str, devices: int, layout: dict[str, int], part_bytes: int) -> list[str]:
    writer = PredictionWriter(folder, part_bytes)
    trainer = quiet(devices=devices, strategy=tex.TexMoEStrategy(**layout), callbacks=[writer])
    loaders = [DataLoader(TensorDataset(SAMPLES), batch_size=2), DataLoader(TensorDataset(SAMPLES), batch_size=4)]
    trainer.predict(Doubles(), loaders, return_predictions=False)
    return [path.name for path in Path(folder).glob("*.pt")]


@pytest.mark.parametrize(
    ("devices", "layout", "part_bytes", "files"),
    [(1, {}, 1, 6), (2, {}, 1 << 20, 2), (2, {"tensor_parallel_size": 2}, 1 << 20, 1)],
)
def test_predictions_come_back_in_the_order_of_samples(
    tmp_path: Path, devices: int, layout: dict[str, int], part_bytes: int, files: int
) -> None:
    (tmp_path / "predictions-7-of-8-00000.pt").write_bytes(b"of an earlier run")
    on_ranks(devices, predict, str(tmp_path), devices, layout, part_bytes)
    assert len(list(tmp_path.iterdir())) == files
    rows, sums = read_predictions(tmp_path)
    assert torch.equal(torch.stack([row["doubled"] for row in rows]), 2 * SAMPLES)
    assert torch.equal(torch.stack([row["first"] for row in rows]), 2 * SAMPLES[:, 0])
    # Of no rows, so in turns: of one rank, or of two, of which the last has samples 1, 3, 5.
    expected = [SAMPLES[:4], SAMPLES[4:]] if len(list(tmp_path.iterdir())) != 2 else [SAMPLES[::2], SAMPLES[1::2]]
    assert [float(total) for total in sums] == [2 * float(part.sum()) for part in expected]


def test_a_folder_without_any_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="legal: the folder of a PredictionWriter"):
        read_predictions(tmp_path)
