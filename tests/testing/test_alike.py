"""Right modules are found to train alike on every layout; wrong ones are told apart, with what is wrong with them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_tex.layers import ColumnParallelLinear, RowParallelLinear
from lightning_tex.models import DecoderConfig, LanguageModel
from lightning_tex.moe import MoE, auxiliary_loss
from lightning_tex.testing import assert_trains_alike, legal_layouts

RECIPES = Path(__file__).parents[2] / "recipes"
TENSOR, DATA = {"devices": 2, "tensor_parallel_size": 2}, {"devices": 2}
TED = {"devices": 4, "tensor_parallel_size": 2, "expert_parallel_size": 2}


class Numbers(Dataset[tuple[Tensor, Tensor]]):
    """Random vectors and targets, in fp32."""

    def __init__(self, samples: int = 64) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(samples, 8, generator=generator), torch.randn(samples, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Small(L.LightningModule):
    """A column and a row layer, experts, a plain head."""

    def __init__(self, between: nn.Module | None = None, capacity_factor: float | None = None) -> None:
        super().__init__()
        self.up, self.down = ColumnParallelLinear(8, 16), RowParallelLinear(16, 8)
        self.between = between or nn.GELU()
        self.experts = MoE(8, 12, num_experts=4, top_k=2, capacity_factor=capacity_factor)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.between(self.up(x)))
        return self.head(x + self.experts(x)).squeeze(-1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader(samples: int = 16) -> DataLoader[Any]:
    return DataLoader(Numbers(), batch_size=samples)


def told(module: Any, data: Any = None, **options: Any) -> str:
    with pytest.raises(AssertionError) as failure:
        assert_trains_alike(module, loader() if data is None else data, **options)
    return str(failure.value)


def test_a_right_module_on_each_kind_of_layout():
    assert len(legal_layouts(Small(), (1, 2, 4))) == 1 + 5 + 12
    folded = {**TED, "expert_parallel_size": 4, "expert_tensor_parallel_size": 1}
    layouts = [{"devices": 1}, TENSOR, DATA, {**DATA, "expert_parallel_size": 2}, TED, folded]
    assert_trains_alike(Small, loader(), layouts=layouts)


@pytest.mark.full
def test_a_right_module_on_every_legal_layout():
    assert_trains_alike(Small, loader())


def test_a_capacity_is_compared_with_one_process_that_decides_as_the_data_ranks():
    assert_trains_alike(lambda: Small(capacity_factor=0.6), loader(), layouts=[DATA, TED])


def test_the_modules_own_optimizer_and_an_instance():
    assert_trains_alike(Small(), loader(), layouts=[TED], optimizer=None, tolerance=1e-7)


def test_a_language_model_with_tied_embeddings_and_sequence_parallelism():
    config = DecoderConfig(vocab_size=31, dim=8, num_layers=2, num_heads=2, num_experts=2, max_sequence_length=6)
    ids = torch.randint(0, 31, (4, 7), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": ids[:, :-1], "labels": ids[:, 1:]}] * 2
    layouts = [{**TED, "sequence_parallel": True}, {**TED, "expert_tensor_parallel_size": 1}, DATA]
    assert_trains_alike(lambda: LanguageModel(config), data, layouts=layouts, steps=2)


def test_the_module_of_the_recipe():
    spec = importlib.util.spec_from_file_location("own_module", RECIPES / "own_module.py")
    own_module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own_module)
    assert_trains_alike(own_module.Regression, layouts=[TENSOR, TED])


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda: nn.Linear(16, 16), r"between \(Linear\) is given 8 of 16 features"),
        (lambda: nn.PReLU(16), r"between \(PReLU\) is given 8 of 16 features"),
        (nn.PReLU, r"between \(PReLU\) is given 8 of 16 features"),
        (lambda: nn.Dropout(0.5), "dropout: between draws other numbers"),
    ],
    ids=["linear", "weight per feature", "one weight", "dropout"],
)
def test_what_stands_between_a_column_and_a_row_layer_is_named(between, reason):
    text = told(lambda: Small(between()), layouts=[TENSOR])
    assert re.search(reason, text), text
    assert "devices=2, tensor_parallel_size=2" in text


class SummedOverRanks(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * self.trainer.strategy.world_size + auxiliary_loss(self)


class SummedOverSamples(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1], reduction="sum")


@pytest.mark.parametrize(("module", "factor"), [(SummedOverRanks, "4 times"), (SummedOverSamples, "1/2 of")])
def test_a_loss_summed_over_ranks_or_samples_is_named(module, factor):
    text = told(module, layouts=[TED])
    assert f"every gradient is {factor} that of one process" in text
    assert "step 1: loss differs" in text


class BatchNormed(Small):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


def test_statistics_of_a_batch_are_named():
    assert "batch statistics: norm (BatchNorm1d)" in told(BatchNormed, layouts=[DATA])


class Endless(IterableDataset[Any]):
    """Gives every data rank the same samples."""

    def __iter__(self) -> Any:
        numbers = Numbers()
        return iter([numbers[i] for i in range(len(numbers))])


class UnsharedData(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        ranks = (self.trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]
        return DataLoader(Endless(), batch_size=16 // ranks)


def test_data_that_gives_all_ranks_the_same_samples_is_named():
    text = told(Small, UnsharedData(), layouts=[TENSOR, DATA])
    assert "1 of 2 layouts" in text
    assert "step 1: the samples" in text
    assert "a sampler that does not share samples over the 2 data ranks" in text


class OneRankFails(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 1:
            raise ZeroDivisionError("by rank 1")
        return super().training_step(batch, batch_idx)


def test_the_error_of_the_rank_that_failed_is_told():
    assert "ZeroDivisionError: by rank 1" in told(OneRankFails, layouts=[DATA])


def test_a_layout_that_is_not_legal_and_a_batch_that_cannot_be_shared():
    text = told(Small, loader(6), layouts=[{"devices": 3, "tensor_parallel_size": 2}, {"devices": 4}])
    assert "tensor_parallel_size=2 does not divide the world of 3 ranks; legal: 1, 3" in text
    assert "could not be tried: a batch of 6 samples for 4 data ranks" in text
