"""What ranks must agree on, and what is refused on all of them when they cannot."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from helpers.behaviour_modules import PublicNames, Unequal, batches, new_trainer, on_data_axis
from helpers.ranks import on_ranks
from helpers.trainers import gathered, quiet
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_tex as tex
from lightning_tex.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from lightning_tex.moe import MoE

TENSOR = {"tensor_parallel_size": 2}


class Tiny(L.LightningModule):
    """One block of plain numbers; logs the mean of its inputs."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.up, self.down = ColumnParallelLinear(4, 8), RowParallelLinear(8, 4)
        self.experts = MoE(4, 8, experts, load_balance_coefficient=0.0)
        self.register_buffer("counts", torch.arange(3, dtype=torch.int16))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.down(self.up(x)))

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self(batch).square().mean()

    def validation_step(self, batch: Tensor, _: int) -> None:
        self(batch)
        self.log("mean", batch.mean(), sync_dist=True)

    def predict_step(self, batch: Tensor, _: int) -> Tensor:
        return self(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def rows(value: float, *sizes: int) -> DataLoader:
    return DataLoader([torch.full((n, 4), value) for n in sizes], batch_size=None)


def validated_mean(sizes: list[list[int]]) -> float:
    trainer = new_trainer({})
    data = trainer.distributed_sampler_kwargs["rank"]
    (metrics,) = trainer.validate(Tiny(), rows(6.0, *sizes[data]), verbose=False)
    return metrics["mean"]


@pytest.mark.parametrize("sizes", [[[2, 2], [2]], [[2, 2], [2, 1]], [[3], [2, 1, 1]]])
def test_a_logged_mean_weighs_every_sample_once(sizes: list[list[int]]) -> None:
    assert on_ranks(2, validated_mean, sizes) == [pytest.approx(6.0)] * 2


def evaluate_nothing_on_one_rank(stage: str, sized: bool) -> str:
    trainer = new_trainer({})
    given = [torch.ones(2, 4)] * (2 if trainer.global_rank == 0 else 0)
    loader = DataLoader(given if sized else Unequal(given), batch_size=None)
    if stage == "fit":
        trainer = new_trainer({}, limit_train_batches=1, num_sanity_val_steps=0)
        arguments = (rows(1.0, 2), loader)
    else:
        arguments = (loader,)
    with pytest.raises(RuntimeError) as caught:
        getattr(trainer, stage)(Tiny(), *arguments)
    return str(caught.value)


@pytest.mark.parametrize("stage", ["fit", "validate", "predict"])
def test_a_rank_without_any_batch_is_named_on_all_ranks(stage: str) -> None:
    for message in on_ranks(2, evaluate_nothing_on_one_rank, stage, False):
        assert "rank(s) 1 have no batch to evaluate" in message


class Tied(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = VocabParallelEmbedding(8, 4), nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        raise AssertionError("is refused before")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_tied(layout: dict[str, Any]) -> str:
    module = Tied()
    with pytest.raises(ValueError, match="one parameter") as caught:
        new_trainer(layout).fit(module, rows(1.0, 2))
    assert module.embedding.weight.shape == (8, 4)
    return str(caught.value)


def test_a_tie_between_a_sharded_and_a_whole_layer_is_refused_before_anything_is_sharded() -> None:
    for message in on_ranks(2, fit_tied, TENSOR):
        assert "embedding.weight" in message and "head.weight" in message and "VocabParallelHead" in message


class Unfrozen(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.up.weight.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        self.up.weight.requires_grad_(self.current_epoch > 0)


def fit_unfrozen(strategy: Any, world: int) -> dict[str, Tensor]:
    module = Unfrozen()
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    trainer = quiet(strategy=strategy, devices=world, max_epochs=2)
    trainer.fit(module, rows(1.0, 2))
    return gathered(module, trainer)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_parameter_that_thaws_is_trained_from_then_on(stage: int) -> None:
    (alone,) = on_ranks(1, fit_unfrozen, "auto", 1)
    for weights in on_ranks(2, fit_unfrozen, tex.TexMoEStrategy(zero_stage=stage, **TENSOR), 2):
        for name, expected in alone.items():
            torch.testing.assert_close(weights[name], expected, rtol=1e-5, atol=1e-7)


def fit_after_sanity_checks() -> str:
    trainer = new_trainer(TENSOR, num_sanity_val_steps=4)
    train = DataLoader([torch.full((2, 4), float(trainer.global_rank))], batch_size=None)
    with pytest.raises(RuntimeError) as caught:
        trainer.fit(Tiny(), train, rows(1.0, 2, 2, 2, 2))
    return str(caught.value)


def test_sanity_checks_do_not_use_up_the_comparison_of_training_batches() -> None:
    for message in on_ranks(2, fit_after_sanity_checks):
        assert "same batch" in message


def fit_two_models() -> tuple[int, int]:
    trainer = new_trainer({})
    trainer.fit(Tiny(4), rows(1.0, 2, 2))
    first = trainer.strategy.topology.expert.size
    trainer.fit_loop.epoch_progress.reset()
    trainer.fit(Tiny(3), rows(1.0, 2, 2))
    return first, trainer.strategy.topology.expert.size


def test_a_second_model_gets_its_own_topology() -> None:
    assert on_ranks(2, fit_two_models) == [(2, 1)] * 2


def different_models() -> str:
    trainer = new_trainer(TENSOR)
    with pytest.raises(RuntimeError) as caught:
        trainer.fit(Tiny(4 + 4 * trainer.global_rank), rows(1.0, 2))
    return str(caught.value)


def test_ranks_with_different_models_are_refused() -> None:
    for message in on_ranks(2, different_models):
        assert "different models" in message


def fit_out_of_range(ids: bool) -> str:
    trainer = new_trainer(TENSOR)
    given = [[inputs.clone(), labels.clone()] for inputs, labels in batches(2)]
    for inputs, labels in given:
        (inputs if ids else labels)[0, 0] = 61 if ids else -1
    with pytest.raises(IndexError) as caught:
        trainer.fit(PublicNames(), on_data_axis(trainer, given))
    return str(caught.value)


@pytest.mark.parametrize("ids", [True, False])
def test_ids_and_targets_out_of_range_are_refused(ids: bool) -> None:
    for message in on_ranks(2, fit_out_of_range, ids):
        assert ("token ids must be between 0 and 60" if ids else "targets between -1 and") in message
