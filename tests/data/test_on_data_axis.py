"""A user's own data set or loader on the data axis: exact order, resumption and shares, in one line."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import pytest
import torch
from helpers.cases import case
from helpers.ranks import on_ranks, together
from helpers.trainers import quiet
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler

from lightning_tex import TexMoEStrategy
from lightning_tex.data import on_data_axis
from lightning_tex.data.order import Share
from lightning_tex.errors import UserValueError
from lightning_tex.testing.ranks import RanksFailed

N, G = 43, 8  # samples; of a micro-step
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*use of fork.. may lead to deadlocks:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]


class Map(Dataset):
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> float:
        return float(index)


class Stream(IterableDataset):
    """Counts what has been read of it."""

    epoch = read = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[float]:
        for i in range(N):
            self.read += 1
            yield float(i + 100 * self.epoch)


class Stateful(Stream):
    """Goes on where its state says."""

    at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]

    def __iter__(self) -> Iterator[float]:
        start, self.at = self.at, 0
        for i in range(start, N):
            self.read, self.at = self.read + 1, i + 1
            yield float(i + 100 * self.epoch)
        self.at = 0  # what has ended begins anew


def of_datasets() -> Any:
    return datasets.Dataset.from_dict({"x": [float(i) for i in range(N)]}).to_iterable_dataset(num_shards=3)


def collate(items: list[Any]) -> Tensor:
    return torch.tensor([item["x"] if isinstance(item, dict) else item for item in items])


KINDS: dict[str, Callable[[], Any]] = {"map": Map, "stream": Stream, "stateful": Stateful, "datasets": of_datasets}


def loader_of(kind: str, workers: int = 0, **options: Any) -> Any:
    return on_data_axis(KINDS[kind](), G, collate_fn=collate, num_workers=workers, **options)


def steps(loader: Any, count: int = 99) -> list[list[float]]:
    """So many batches of the epoch that it stands in."""
    iterator = iter(loader)
    read = [batch.tolist() for batch in islice(iterator, count)]
    iterator.close()
    return read


def placed(loader: Any, rank: int, ranks: int) -> Any:
    loader.order.share, loader._placed = Share(G, ranks, rank), True
    return loader


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.full)])
def test_an_epoch_on_every_data_axis(kind: str, workers: int) -> None:
    alone = steps(loader_of(kind))
    assert len(alone) == N // G
    assert len(set(chain(*alone))) == N // G * G
    assert (alone[0] == [float(i) for i in range(G)]) == (kind != "map")
    for ranks in (1, 2, 4, 8) if not workers else (2,):
        with case(ranks=ranks):
            shares = [steps(placed(loader_of(kind, workers), rank, ranks)) for rank in range(ranks)]
            assert [list(chain(*parts)) for parts in zip(*shares, strict=True)] == alone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.full)])
def test_going_on_from_a_state(kind: str, workers: int) -> None:
    whole = steps(loader_of(kind))
    for stop in (1, 4) if workers else range(1, 5):
        with case(stop=stop):
            loader = loader_of(kind, workers)
            first, state = steps(loader, stop), loader.state_dict()
            rest = loader_of(kind, workers)
            rest.load_state_dict(state)
            assert first + steps(rest) == whole


@pytest.mark.parametrize("kind", ["map", "stateful"])
def test_twenty_stops_on_changing_axes(kind: str) -> None:
    draw, state, seen = random.Random(kind), loader_of(kind).state_dict(), []
    whole: list[list[float]] = []
    plain = loader_of(kind)
    while len(whole) < 70:
        plain.order.set_epoch(len(whole) // (N // G))
        whole += steps(plain)
    for stop in range(20):
        ranks, most = draw.choice([1, 2, 4, 8]), draw.randint(0, 4)
        with case(stop=stop, ranks=ranks, most=most, at=len(seen)):
            loaders = [placed(loader_of(kind), rank, ranks) for rank in range(ranks)]
            for loader in loaders:
                loader.load_state_dict(state)
            parts = [steps(loader, most) for loader in loaders]
            seen += [list(chain(*part)) for part in zip(*parts, strict=True)]
            states = [loader.state_dict() for loader in loaders]
            assert all(one == states[0] for one in states)
            state = states[0]
            assert seen == whole[: len(seen)]
    assert len(seen) > 20


def test_what_goes_on_by_its_state_is_not_read_again() -> None:
    loader, rest = loader_of("stateful"), loader_of("stateful")
    steps(loader, 4)
    rest.load_state_dict(loader.state_dict())
    assert rest.state_dict()["state"] == {"at": 4 * G}
    steps(rest)
    assert rest.dataset.dataset.read == N - 4 * G
    again = loader_of("stream")
    again.load_state_dict({**loader.state_dict(), "state": None})
    steps(again)
    assert again.dataset.dataset.read == N


def test_a_shuffle_buffer_which_is_not_resumed_exactly_is_read_over() -> None:
    def make() -> Any:
        return on_data_axis(of_datasets().shuffle(3, buffer_size=9), G, collate_fn=collate)

    whole, loader, rest = steps(make()), make(), make()
    first = steps(loader, 3)
    rest.load_state_dict(loader.state_dict())
    assert first + steps(rest) == whole


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_evaluation_reads_every_sample_once(kind: str) -> None:
    for ranks in (1, 2, 4, 8):
        with case(ranks=ranks):
            shares = [steps(placed(loader_of(kind, evaluation=True), rank, ranks)) for rank in range(ranks)]
            assert sorted(chain(*chain(*shares))) == [float(i) for i in range(N)]
            if kind == "map":
                lengths = [len(placed(loader_of(kind, evaluation=True), rank, ranks)) for rank in range(ranks)]
                assert lengths == [len(share) for share in shares]


def test_a_loader_of_the_users_is_taken_over() -> None:
    given = DataLoader(Map(), batch_size=G, shuffle=True, collate_fn=collate, num_workers=2)
    loader = on_data_axis(given)
    assert loader.num_workers == 2
    assert steps(loader) == steps(loader_of("map"))
    assert steps(on_data_axis(DataLoader(Map(), batch_size=G)))[0] == [float(i) for i in range(G)]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: on_data_axis(Map()), "global_batch_size is needed with a data set"),
        (lambda: on_data_axis(DataLoader(Map(), G), 4), "a DataLoader has its batch_size and options"),
        (lambda: on_data_axis(DataLoader(Map(), batch_size=None)), "without batch_size; legal: batch_size=G"),
        (
            lambda: on_data_axis(DataLoader(Map(), G, sampler=WeightedRandomSampler([1.0] * N, N))),
            "a DataLoader with a WeightedRandomSampler, whose order is not known on other layouts; legal: shuffle=True",
        ),
        (lambda: on_data_axis(Map(), 0), "global_batch_size=0 cannot be shared"),
        (
            lambda: on_data_axis(Map(), G, num_workers=2, persistent_workers=True),
            "persistent_workers=True of data on the data axis; legal options are num_workers, collate_fn",
        ),
    ],
)
def test_what_is_not_legal(make: Any, words: str) -> None:
    with pytest.raises(UserValueError, match=words):
        make()


def test_too_few_samples_for_a_micro_step() -> None:
    with pytest.raises(UserValueError, match="global_batch_size=44 is more than the 43 samples: there is no"):
        on_data_axis(Map(), 44)
    assert len(steps(on_data_axis(Map(), 44, evaluation=True))) == 1
    with pytest.raises(UserValueError, match="global_batch_size=44 is more than an iterable data set has samples"):
        steps(on_data_axis(Stream(), 44))


def evaluated(samples: int) -> None:
    """On a rank of two."""

    class Few(Own):
        def val_dataloader(self) -> Any:
            return on_data_axis(torch.utils.data.Subset(Map(), range(samples)), G, evaluation=True)

    quiet(devices=2, strategy=TexMoEStrategy()).validate(Few("map", 0), verbose=False)


def test_ranks_without_a_sample_to_evaluate_are_named() -> None:
    with pytest.raises(RanksFailed, match=r"the 4 samples to evaluate leave some of 2 data .* 5 samples") as failed:
        on_ranks(2, evaluated, 4)
    assert not failed.value.hung


def test_other_data_is_refused() -> None:
    state = loader_of("map").state_dict()
    with pytest.raises(UserValueError, match=r"samples=43 of the data on the data axis, .* trained with samples=42"):
        loader_of("map").load_state_dict({**state, "samples": 42})
    with pytest.raises(UserValueError, match=r"seed=1 of the data .* seed=0"):
        loader_of("map", seed=1).load_state_dict(state)


# --- in a module of the user's


class Own(L.LightningModule):
    """Has loaders of its own, and remembers what they gave."""

    def __init__(self, kind: str, workers: int) -> None:
        super().__init__()
        self.kind, self.workers = kind, workers
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[float]] = []
        self.validated: list[list[float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(batch.tolist())
        return self.weight * batch.mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(batch.tolist())

    def train_dataloader(self) -> Any:
        return loader_of(self.kind, self.workers, trainer=self.trainer)

    def val_dataloader(self) -> Any:
        return loader_of(self.kind, self.workers, evaluation=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(kind: str, workers: int, count: int, layout: Any, path: Path, resume: bool = False) -> tuple[int, Any, Any]:
    module = Own(kind, workers)
    strategy = TexMoEStrategy(**layout) if layout is not None else "auto"
    devices = 4 if layout else 1
    trainer = quiet(max_steps=count, devices=devices, strategy=strategy, num_sanity_val_steps=0)
    trainer.fit(module, ckpt_path=path if resume else None)
    if not resume:
        trainer.save_checkpoint(path)
    return (trainer.distributed_sampler_kwargs or {"rank": 0})["rank"], module.seen, module.validated


def by_step(ranks: list[Any]) -> list[list[float]]:
    shares = {rank: seen for rank, seen, _ in ranks}
    return [list(chain(*parts)) for parts in zip(*(shares[rank] for rank in sorted(shares)), strict=True)]


def test_a_run_on_a_layout_goes_on_in_one_process(tmp_path: Path) -> None:
    """Stopped in the second epoch of five steps; validation reads every sample once an epoch."""
    runs = {
        kind: (fit, kind, 0, 7, {"tensor_parallel_size": 2}, tmp_path / f"{kind}.ckpt") for kind in ("map", "stream")
    }
    for kind, ranks in together(4, runs).items():
        with case(kind):
            ((_, whole, validated),) = on_ranks(1, fit, kind, 2, 12, {}, tmp_path / "whole.ckpt")
            assert by_step(ranks) == whole[:7]
            assert sorted(chain(*validated)) == sorted([float(i) for i in range(N)] * 2)
            ((_, rest, _),) = on_ranks(1, fit, kind, 0, 12, {}, tmp_path / f"{kind}.ckpt", True)
            assert rest == whole[7:]


@pytest.mark.parametrize("kind", ["map", "stateful"])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.full)])
def test_under_lightnings_own_strategy(tmp_path: Path, kind: str, workers: int) -> None:
    _, whole, _ = fit(kind, workers, 4, None, tmp_path / "whole.ckpt")
    assert whole == steps(loader_of(kind), 4)
    fit(kind, workers, 2, None, tmp_path / "stopped.ckpt")
    assert fit(kind, 0, 4, None, tmp_path / "stopped.ckpt", resume=True)[1] == whole[2:]
