"""Data and modules that a comparison must neither pass nor fail by mistake."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tex.errors import UserValueError
from lightning_tex.testing import assert_trains_alike, compare_layouts

DATA = {"devices": 2}


class Plain(L.LightningModule):
    """A linear layer and the mean of squares."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.head(batch[0]).squeeze(-1), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, weight_decay=0.1)


def batches(count: int = 2, samples: int = 8) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(samples, 4, generator=generator), torch.randn(samples, generator=generator)]] * count


def check(module: Any, data: Any, layouts: Any = (DATA,), steps: int = 2, **options: Any) -> None:
    assert_trains_alike(module, data, layouts=layouts, steps=steps, **options)


def told(module: Any, data: Any, **options: Any) -> str:
    with pytest.raises(AssertionError) as failure:
        check(module, data, **options)
    return str(failure.value)


@dataclass
class Pair:
    x: Tensor
    y: Tensor


class OfPairs(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.head(batch.x).squeeze(-1), batch.y, reduction="sum")


def test_a_sum_over_a_dataclass_of_tensors_is_seen():
    assert "every gradient is 1/2 of that of one process" in told(OfPairs, [Pair(*batch) for batch in batches()])


class Graph:
    """Holds tensors where nothing looks for them."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class OfGraphs(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.head(batch.x.to(self.head.weight.dtype)).square().sum()


def test_batches_without_tensors_are_refused():
    with pytest.raises(UserValueError, match="the data gave no batch with tensors but a Graph; legal: tensors"):
        check(OfGraphs, [Graph(torch.ones(8, 4))])


class WithTheoreticalZero(Plain):
    """A shift of all logits alike, whose gradient is rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.logits, self.shift = nn.Linear(4, 3), nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        labels = batch[1].gt(0).long()
        return F.cross_entropy(self.logits(batch[0]) + self.shift, labels) + 0 * self.head.weight.sum()


def test_a_gradient_that_is_zero_in_theory_is_no_difference():
    check(WithTheoreticalZero, batches())


class EveryFourBatches(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx) / 4)
        if batch_idx % 4 == 3:
            self.optimizers().step()
            self.optimizers().zero_grad()


def test_a_manual_module_is_given_the_batches_of_all_its_steps():
    check(EveryFourBatches, batches(8))


def test_no_step_and_no_batches_are_refused():
    with pytest.raises(UserValueError, match="takes no optimizer step on these batches"):
        check(EveryFourBatches, batches(3))
    with pytest.raises(UserValueError, match="the data gave no batches"):
        check(Plain, [])


class WithSmallLoader(L.LightningDataModule):
    """A loader that fails where there are ranks."""

    def train_dataloader(self) -> DataLoader[Any]:
        if self.trainer.world_size > 1:
            raise ZeroDivisionError("by the loader")
        return DataLoader(TensorDataset(*batches()[0]), batch_size=8)


def test_a_loader_that_fails_on_a_layout_fails_only_that_layout():
    verdicts = compare_layouts(lambda: (Plain(), WithSmallLoader()), [DATA, {"devices": 1}], steps=1)
    assert [verdict.status for verdict in verdicts] == ["failed", "alike"]
    assert verdicts[0].error == "on its own loader: raised: ZeroDivisionError: by the loader"


class Transferring(Plain):
    """Hooks that must run once: the second time they would not know the batch."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return {"x": x, "y": y}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (batch["x"] * 2, batch["y"])


def test_hooks_of_the_transfer_run_once():
    check(Transferring, batches())


class WithUnused(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(4))


def test_weight_decay_of_an_unused_parameter_is_no_difference():
    check(WithUnused, batches(), optimizer=None)


class OfTwoLoaders(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(super(OfTwoLoaders, self).training_step(part, batch_idx) for part in batch)


@pytest.mark.parametrize("combine", [list, CombinedLoader])
def test_several_loaders_are_loaders_and_no_batches(combine):
    loaders = [DataLoader(TensorDataset(*batches(samples=16)[0]), batch_size=8) for _ in range(2)]
    check(OfTwoLoaders, combine(loaders))


class UsersMistake(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.world_size > 1:
            raise KeyError("x")
        return super().training_step(batch, batch_idx)


def test_an_error_of_the_users_is_told_without_a_guess():
    (verdict,) = compare_layouts(lambda: (UsersMistake(), batches()), [DATA], steps=1)
    assert (verdict.status, verdict.error, verdict.reason) == ("failed", "raised: KeyError: 'x'", None)


class NotFinite(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * float("nan")


def test_what_is_not_finite_in_one_process_either():
    text = told(NotFinite, batches())
    assert "step 1: loss is not finite in one process either" in text
    assert "the data axis" not in text


def test_a_tolerance_of_zero_is_held():
    assert "differs by" in told(Plain, batches(), precision="32-true", tolerance=0.0, steps=1)
