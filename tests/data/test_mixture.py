"""Mixtures: shares, epochs of each source, the same on every layout, gone on with exactly, and losses by source."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from helpers.behaviour_modules import TED, new_trainer
from helpers.cases import case
from helpers.ranks import on_ranks
from helpers.trainers import quiet
from hypothesis import given
from hypothesis import strategies as st

from lightning_tex import LanguageModel, MixtureDataModule
from lightning_tex.data import TextSource
from lightning_tex.data.mixing import Mixture, MixtureSampler, Weights
from lightning_tex.data.order import Share, sample_order
from lightning_tex.data.packing import Batch, Samples
from lightning_tex.errors import UserValueError
from lightning_tex.models import DecoderConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*use of fork.. may lead to deadlocks:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]
NAMES = ("code", "prose", "little")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpora")
    for name, count in zip(NAMES, (40, 30, 6), strict=True):
        (root / name).mkdir()
        for i in range(count):
            (root / name / f"{i:02d}.txt").write_text(f"{name} number {i} says {i * i} " * (3 + i % 5))
    return root


@pytest.fixture
def make(corpora: Path) -> Callable[..., MixtureDataModule]:
    return functools.partial(module_of, corpora)


def module_of(corpora: Path, weights: Any = (3, 2, 1), **options: Any) -> MixtureDataModule:
    sources = {name: TextSource(str(corpora / name), weight=w) for name, w in zip(NAMES, weights, strict=True)}
    usual = {"vocab_size": 300, "sequence_length": 16, "global_batch_size": 8, "num_proc": 1}
    return MixtureDataModule(sources, **{**usual, "cache_dir": str(corpora.parent / "cache"), **options})


class Numbered(Samples):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, samples: list[int]) -> Batch:
        return {"input_ids": torch.tensor(samples)[:, None] + 100 * self.size, "sample": torch.tensor(samples)}


def sampler(sizes: list[int], weights: list[Any], size: int, rank: int = 0, ranks: int = 1) -> MixtureSampler:
    names = [str(i) for i in range(len(sizes))]
    mixture = Mixture({name: Numbered(n) for name, n in zip(names, sizes, strict=True)})
    share = Share(size, ranks, rank)
    return MixtureSampler(mixture, share, Weights(dict(zip(names, weights, strict=True))), 5, names)


def steps_of(mixed: MixtureSampler, first: int, count: int) -> list[list[int]]:
    mixed.seek(0, first, period=first + count)
    iterator = iter(mixed)
    return [next(iterator) for _ in range(count)]


@given(
    weights=st.lists(st.floats(0.01, 9), min_size=1, max_size=5), size=st.integers(1, 24), steps=st.integers(1, 60)
)  # fmt: skip
def test_every_source_has_its_share_of_every_step(weights: list[float], size: int, steps: int) -> None:
    mixed = sampler([7] * len(weights), weights, size)
    counts = mixed._counts(np.arange(steps))
    exact = np.array(weights) / sum(weights) * size
    assert (counts.sum(1) == size).all()
    assert (np.abs(counts - exact) < 1 + 1e-9).all()
    assert mixed.drawn(steps).tolist() == counts.sum(0).tolist()


def test_in_the_mean_shares_are_exact_and_steps_differ() -> None:
    counts = sampler([7] * 3, [0.5, 0.3, 0.2], 4)._counts(np.arange(20_000))
    assert counts.mean(0) == pytest.approx([2.0, 1.2, 0.8], abs=0.02)
    assert len(np.unique(counts, axis=0)) > 1


def test_a_source_is_read_in_the_order_of_its_own_epochs() -> None:
    sizes = [5, 13, 40]
    mixed = sampler(sizes, [1, 1, 2], 8)
    drawn: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for step in steps_of(mixed, 0, 25):
        by_source: dict[int, list[int]] = {}
        for index in step:
            source = int(np.searchsorted(mixed.mixture.starts, index, side="right")) - 1
            by_source.setdefault(source, []).append(index - int(mixed.mixture.starts[source]))
        for source, own in by_source.items():
            drawn[source] += sorted(own)
    assert [len(drawn[k]) for k in range(3)] == mixed.drawn(25).tolist()
    for source, own in drawn.items():
        size, counts = sizes[source], Counter(own)
        whole, rest = divmod(len(own), size)
        assert set(counts.values()) <= {whole, whole + 1}
        begun = set(sample_order(size, 5, whole, str(source))[:rest].tolist())
        assert {index for index, count in counts.items() if count == whole + 1} == begun


def test_rows_of_a_step_tell_nothing_of_their_source() -> None:
    mixed = sampler([50, 50], [1, 1], 8)
    places = np.array([[index >= 50 for index in step] for step in steps_of(mixed, 0, 200)]).mean(0)
    assert (np.abs(places - 0.5) < 0.2).all()


def test_a_step_is_a_function_of_its_number() -> None:
    whole = steps_of(sampler([9, 21], [1, {0: 1, 30: 5}], 6), 0, 40)
    for first in (1, 7, 33):
        assert steps_of(sampler([9, 21], [1, {0: 1, 30: 5}], 6), first, 40 - first) == whole[first:]
    shares = [steps_of(sampler([9, 21], [1, {0: 1, 30: 5}], 6, rank, 3), 0, 40) for rank in range(3)]
    assert [list(chain(*parts)) for parts in zip(*shares, strict=True)] == whole


def test_weights_that_change() -> None:
    weights = Weights({"a": 1, "b": {0: 1, 100: 3, 200: 0}})
    shares = weights.shares(np.array([0, 50, 100, 150, 200, 9999]))
    assert shares[:, 1] == pytest.approx([1 / 2, 2 / 3, 3 / 4, 1.5 / 2.5, 0, 0])
    mixed = sampler([5, 5], [1, {0: 1, 100: 3, 200: 0}], 4)
    assert (mixed._counts(np.arange(200, 300))[:, 1] == 0).all()


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ((0, 0, 0), "the weights of all sources are 0 at micro-step 0"),
        ((1, -1, 1), "weight=-1 of source 'prose'; legal"),
    ],
)
def test_weights_that_are_not_legal(make: Any, weights: Any, words: str) -> None:
    with pytest.raises(UserValueError, match=words):
        make(weights)


# --- the module


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_sources_own_on_every_data_axis(make: Any, workers: int) -> None:
    alone = list(make(num_workers=workers).train_dataloader())
    data = make()
    starts, sources = data.prepared.train.starts, data.prepared.train.sources
    for batch in alone:
        for sample, ids in zip(batch["sample"].tolist(), batch["input_ids"], strict=True):
            source = int(np.searchsorted(starts, sample, side="right")) - 1
            assert torch.equal(sources[source][[sample - int(starts[source])]]["input_ids"][0], ids)
    for ranks in (2,) if workers else (2, 4, 8):
        with case(ranks=ranks):
            shares = []
            for rank in range(ranks):
                part = make(num_workers=workers)
                part._share = functools.partial(Share, part.global_batch_size, ranks, rank)
                shares.append(list(part.train_dataloader()))
            for step, parts in zip(alone, zip(*shares, strict=True), strict=True):
                assert torch.equal(step["labels"], torch.cat([part["labels"] for part in parts]))


def test_validation_reads_every_block_once_source_by_source(make: Any) -> None:
    data = make()
    batches = list(data.val_dataloader())
    assert [batch["source"] for batch in batches] == sorted(
        (batch["source"] for batch in batches), key=NAMES.index
    )  # fmt: skip
    assert {batch["source"] for batch in batches} == set(NAMES)
    samples = [sample for batch in batches for sample in batch["sample"].tolist()]
    assert [sample for sample in samples if sample >= 0] == list(range(len(data.prepared.validation)))
    assert all((batch["labels"][batch["sample"] < 0] == -100).all() for batch in batches)


CHANGING: dict[str, Any] = {"weights": (1, {0: 1, 9: 9}, 1)}


@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=pytest.mark.full), pytest.param({"num_workers": 2}, marks=pytest.mark.full), CHANGING],
    ids=str,
)
def test_a_run_resumes_at_the_next_sample(make: Any, recorder: Any, tmp_path: Path, options: Any) -> None:
    """In the first, second and third of Lightning's epochs, which a limit has made short, and with another limit."""
    flags = {"devices": 1, "limit_val_batches": 0, "default_root_dir": tmp_path}
    undisturbed = recorder()
    quiet(max_steps=20, max_epochs=9, limit_train_batches=6, **flags).fit(undisturbed, datamodule=make(**options))
    for done, limit in ((4, 6), (6, 6), (8, 6), (15, 4)):
        with case(done=done, limit=limit):
            first, rest = recorder(), recorder()
            stopped = quiet(max_steps=done, max_epochs=9, limit_train_batches=6, **flags)
            data = make(**options)
            stopped.fit(first, datamodule=data)
            stopped.save_checkpoint(tmp_path / "stopped.ckpt")
            state = data.state_dict()
            assert sum(source["drawn"] for source in state["sources"].values()) == state["samples"] == 8 * done
            again = quiet(max_steps=20, max_epochs=99, limit_train_batches=limit, **flags)
            again.fit(rest, datamodule=make(**options), ckpt_path=str(tmp_path / "stopped.ckpt"))
            assert first.seen + rest.seen == undisturbed.seen


def test_a_source_that_has_changed_is_named(make: Any, corpora: Path) -> None:
    state = make().state_dict()
    state["sources"]["prose"]["fingerprint"] = "another"
    data = make()
    data.load_state_dict(state)
    with pytest.raises(UserValueError, match=r"source 'prose' has changed: fingerprint .*, in the checkpoint another"):
        data.train_dataloader()


def test_a_source_of_too_little_text(make: Any) -> None:
    with pytest.raises(UserValueError, match="source 'code' has fewer training tokens than one block of 5001"):
        make(sequence_length=5000).train_dataloader()


# --- losses


class Model(LanguageModel):
    def __init__(self) -> None:
        super().__init__(DecoderConfig(300, dim=16, num_layers=2, num_heads=2, hidden_dim=16, num_experts=2))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def validated(corpora: Path, layout: Any) -> dict[str, float]:
    L.seed_everything(1, verbose=False)
    trainer = new_trainer(layout, max_steps=3, limit_val_batches=1.0, val_check_interval=3)
    module = Model()
    trainer.fit(module, datamodule=module_of(corpora, document_mask=True))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val_loss")}
    if layout is None:  # by hand, of each source alone
        sums: dict[str, Any] = {}
        for batch in module_of(corpora, document_mask=True).val_dataloader():
            total, count = module._loss_sum(batch)
            sums[batch["source"]] = sums.get(batch["source"], 0) + torch.stack([total, count]).detach()
        by_hand = {f"val_loss/{name}": float(total / count) for name, (total, count) in sums.items()}
        by_hand["val_loss"] = float(sum(s[0] for s in sums.values()) / sum(s[1] for s in sums.values()))
        assert metrics == pytest.approx(by_hand, rel=1e-5)
    return metrics


def test_losses_of_each_source_on_layouts(corpora: Path) -> None:
    alone = on_ranks(1, validated, corpora, None)[0]
    assert alone.keys() == {"val_loss", *(f"val_loss/{name}" for name in NAMES)}
    assert len(set(alone.values())) == 4
    for metrics in on_ranks(4, validated, corpora, TED):
        assert metrics == pytest.approx(alone, rel=1e-6)
