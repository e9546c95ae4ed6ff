"""Training batches: samplers, workers, batches that are fewer or shorter on some ranks, batches that must be equal."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from helpers.behaviour_modules import (
    TED,
    PublicNames,
    Unequal,
    assert_equal_to_one_process,
    batches,
    loader,
    new_trainer,
    own_slices,
)
from helpers.cases import in_full
from helpers.ranks import on_ranks, together
from helpers.trainers import gathered
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_tex.parallel.flight_record import TRAINING
from lightning_tex.testing.ranks import RanksFailed


def train_unequal(layout: Any, iterable: bool) -> dict[str, Any]:
    module = PublicNames()
    trainer = new_trainer(layout, max_epochs=2)
    own = batches(5)[: (5, 3)[trainer.distributed_sampler_kwargs["rank"]]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(Unequal(own), batch_size=None) if iterable else loader(own))
    texts = [str(w.message) for w in caught]
    return {"steps": trainer.global_step, "warned": any("end" in t and "rank" in t for t in texts), "texts": texts}


@pytest.mark.parametrize("iterable", [False, True], ids=["sampler", "iterable"])
def test_training_with_unequal_numbers_of_batches_ends_together(iterable: bool) -> None:
    outcomes = on_ranks(4, train_unequal, TED, iterable)
    assert [outcome["steps"] for outcome in outcomes] == [6] * 4
    assert outcomes[0]["warned"], outcomes[0]["texts"]


class StopsItself(L.Callback):
    """One rank alone asks for the end, in a hook."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._stop)

    def _stop(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step in (0, 3, 6):
            trainer.should_stop = True


class Validated(PublicNames):
    """Looks at validation data."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.training_step(batch, batch_idx)


HOOKS = {
    "on_train_start": 0,
    "on_train_batch_end": 3,
    "on_validation_end": 3,
    "on_train_epoch_end": 6,
}


def stopped_by_one(hook: str) -> tuple[int, int]:
    trainer = new_trainer({}, max_epochs=3, callbacks=[StopsItself(hook)], val_check_interval=3, num_sanity_val_steps=0)
    given = own_slices(trainer, batches(6))
    trainer.fit(Validated(), loader(given), loader(given[:1]))
    return trainer.global_step, trainer.current_epoch


def test_one_rank_that_ends_the_training_ends_it_everywhere() -> None:
    found = together(2, {hook: (stopped_by_one, hook) for hook in HOOKS})
    for hook, steps in HOOKS.items():
        assert {ended[0] for ended in found[hook]} == {steps}, hook
        assert len(set(found[hook])) == 1, hook


class EndsItsEpoch(PublicNames):
    """One rank alone answers -1, in the second batch of the first epoch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        odd = self.trainer.global_rank == 1 and self.trainer.current_epoch == 0 and batch_idx == 1
        return -1 if odd else None


def ended_epoch() -> tuple[int, int, bool]:
    module, trainer = EndsItsEpoch(), new_trainer({}, max_epochs=3)
    trainer.fit(module, loader(own_slices(trainer, batches(3))))
    return trainer.global_step, trainer.current_epoch, "on_train_batch_start" in vars(module)


def test_an_epoch_that_one_rank_s_hook_ends_ends_everywhere() -> None:
    assert on_ranks(2, ended_epoch) == [(1 + 3 + 3, 3, False)] * 2


class Votes(L.Callback):
    """Shapes of what ranks voted about, from the end of a batch to that of the next one."""

    def __init__(self) -> None:
        self.seen = 0
        self.between: list[list[Any]] = []

    def on_train_batch_end(self, *_: Any) -> None:
        calls = [call for call in TRAINING.last_calls if call.number > self.seen]
        self.seen = TRAINING.number
        self.between.append([(call.shape, call.dtype) for call in calls if call.operation == "vote"])


def votes_in_steps(accumulated: int) -> list[list[Any]]:
    votes = Votes()
    trainer = new_trainer({}, callbacks=[votes], accumulate_grad_batches=accumulated)
    trainer.fit(PublicNames(), loader(own_slices(trainer, batches(6))))
    return votes.between[1:]


def test_a_batch_has_one_vote_of_two_numbers() -> None:
    of_16_bytes = (torch.Size([2]), torch.int64)
    found = together(2, {n: (votes_in_steps, n) for n in (1, 2)})
    for accumulated in (1, 2):
        assert found[accumulated] == [[[of_16_bytes]] * 5] * 2, accumulated


class ClockAhead(L.Callback):
    """By one rank's clock a validation is due after the second step."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 1:
            trainer._last_val_time -= 7200


class NotesValidations(L.Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps.append(trainer.global_step)


def validated_by_time() -> list[int]:
    notes = NotesValidations()
    flags = {"val_check_interval": {"hours": 1}, "num_sanity_val_steps": 0}
    trainer = new_trainer({}, callbacks=[ClockAhead(), notes], **flags)
    given = own_slices(trainer, batches(4))
    trainer.fit(Validated(), loader(given), loader(given[:1]))
    return notes.steps


def test_a_validation_that_is_due_by_one_rank_s_clock_is_run_by_all() -> None:
    assert on_ranks(2, validated_by_time) == [[2], [2]]


def fit_short_last_batch(layout: Any, uneven: bool) -> dict[str, Tensor]:
    module = PublicNames(capacity_factor=None if not uneven else 1.0)
    trainer = new_trainer(layout)
    data = [*batches(3), [part[:4] for part in batches(1, seed=9)[0]]]
    mine = own_slices(trainer, data)
    if uneven and trainer.strategy.distributed_sampler_kwargs["rank"]:
        mine[-1] = [part[:1] for part in mine[-1]]
    trainer.fit(module, loader(mine))
    return gathered(module, trainer) | {"steps": torch.tensor(trainer.global_step)}


def test_short_last_batch() -> None:
    assert_equal_to_one_process(fit_short_last_batch, False)


def test_last_batch_that_is_shorter_on_some_ranks() -> None:
    outcomes = on_ranks(4, fit_short_last_batch, TED, True)
    for outcome in outcomes:
        assert int(outcome["steps"]) == 4
        assert all(bool(value.isfinite().all()) for value in outcome.values())
        assert all(torch.equal(value, outcomes[0][name]) for name, value in outcome.items())


class RunsOut(PublicNames):
    """Its own iterator does, on one rank."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.trainer.global_rank == 1 and batch_idx == 2:
            next(iter([]))
        return super().training_step(batch, batch_idx)


def fit_that_runs_out() -> None:
    trainer = new_trainer({})
    trainer.fit(RunsOut(), loader(own_slices(trainer, batches(4))))


def test_a_step_that_raises_stop_iteration_does_not_end_one_rank_s_epoch() -> None:
    with pytest.raises(RanksFailed, match=r"training_step raised StopIteration on rank 1: .*next\(iterator, default"):
        on_ranks(2, fit_that_runs_out)


class Numbers(Dataset):
    """Sample i is i, and what the worker's random states give."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        drawn = [int(torch.randint(2**30, ())), int(np.random.randint(2**30))]  # noqa: NPY002
        return {"index": torch.tensor(index), "drawn": torch.tensor(drawn)}


class SeesSamples(PublicNames):
    def __init__(self) -> None:
        super().__init__()
        self.indices: list[int] = []
        self.drawn: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.indices += batch["index"].tolist()
        self.drawn += batch["drawn"].flatten().tolist()
        return self.loss([batch["index"][:, None], batch["index"][:, None]])


def fit_numbers(layout: Any, workers: int, seeded: bool) -> dict[str, Any]:
    L.seed_everything(7, workers=seeded, verbose=False)
    module = SeesSamples()
    trainer = new_trainer(layout, use_distributed_sampler=True)
    trainer.fit(module, DataLoader(Numbers(), batch_size=2, shuffle=True, num_workers=workers))
    sampler = trainer.train_dataloader.sampler
    assert isinstance(sampler, DistributedSampler)
    return {"indices": module.indices, "drawn": module.drawn, "replicas": sampler.num_replicas, "rank": sampler.rank}


def test_lightning_injects_a_sampler_over_the_data_axis() -> None:
    found = on_ranks(4, fit_numbers, TED, 0, False)
    assert [f["replicas"] for f in found] == [2] * 4
    assert [f["rank"] for f in found] == [0, 0, 1, 1]
    assert found[0]["indices"] == found[1]["indices"]
    assert found[2]["indices"] == found[3]["indices"]
    assert sorted(found[0]["indices"] + found[2]["indices"]) == list(range(16))


@pytest.mark.parametrize("seeded", in_full([False, True], {True}))
def test_workers_draw_alike_over_tensor_and_differently_over_data(seeded: bool) -> None:
    found = on_ranks(4, fit_numbers, TED, 2, seeded)
    assert found[0]["drawn"] == found[1]["drawn"]
    assert found[2]["drawn"] == found[3]["drawn"]
    everything = found[0]["drawn"] + found[2]["drawn"]
    assert len(set(everything)) == len(everything), "two samples drew the same numbers"


def fit_differing(layout: Any, odd: int) -> str:
    module = PublicNames()
    trainer = new_trainer(layout)
    data = own_slices(trainer, batches(4))
    if trainer.global_rank == odd:
        data[0] = [data[0][0].flip(0), data[0][1]]
    try:
        trainer.fit(module, loader(data))
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def test_batches_that_differ_over_tensor_are_refused_on_all_ranks() -> None:
    for text in on_ranks(4, fit_differing, TED, 3):
        assert "rank(s) 3 " in text
        assert "trainer.distributed_sampler_kwargs" in text
