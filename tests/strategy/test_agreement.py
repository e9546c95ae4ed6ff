"""What differs between ranks is refused at the start, on all of them, naming it with the ranks and values."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers.behaviour_modules import DictLogger, batches, loader, on_ranks
from helpers.mismatches import (
    DATA,
    LOGGED,
    MODEL,
    OPTIMIZER,
    STRATEGY,
    TRAINER,
    Mismatch,
    Run,
    Small,
    circumstances,
    prepared,
    what_was_said,
)
from helpers.trainers import quiet
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_tex as tex
from lightning_tex.errors import UserRuntimeError

# Seconds within which a difference is named.
_SOON = 10


@pytest.mark.parametrize(
    "mismatches",
    [STRATEGY, TRAINER, MODEL, DATA, OPTIMIZER, LOGGED],
    ids=["strategy", "trainer", "model", "data", "optimizer", "logged"],
)
def test_a_rank_that_differs_is_named_on_all_ranks(mismatches: dict[str, Mismatch]) -> None:
    for said in on_ranks(2, what_was_said, mismatches):
        for name, mismatch in mismatches.items():
            text, took = said[name]
            assert all(words in text for words in mismatch.words), (name, text)
            assert took.is_within(_SOON), (name, took)


class Sentences(tex.TextDataModule):
    """A little text, prepared already.

    Args:
        folder: to write it to.
        word: in every sentence.
        global_batch_size: of the data module.
    """

    def __init__(self, folder: Path, word: str, global_batch_size: int) -> None:
        folder.mkdir()
        for n in range(40):
            (folder / f"{n}.txt").write_text(f"The {word} fox no. {n} jumps over {n + 1} lazy dogs.")
        options = {"vocab_size": 300, "sequence_length": 8, "cache_dir": str(folder.parent / f"cache of {folder.name}")}
        super().__init__(str(folder), global_batch_size=global_batch_size, **options)
        self.setup()

    def prepare_data(self) -> None:
        """Nothing: the constructor has done it."""


def fit_text(by_rank: list[Sentences]) -> str:
    trainer = quiet(devices=2, strategy=tex.TexMoEStrategy(), max_steps=1)
    with pytest.raises(UserRuntimeError) as caught:
        trainer.fit(Small(), by_rank[int(os.environ["RANK"])])
    return str(caught.value)


def test_text_that_differs_is_named_on_all_ranks(tmp_path: Path) -> None:
    by_rank = [Sentences(tmp_path / "quick", "quick", 8), Sentences(tmp_path / "brown", "brown", 16)]
    for text in on_ranks(2, fit_text, by_rank):
        assert text.startswith("ranks have different data: global_batch_size is 16 on rank 1 and 8 on rank 0; ")
        assert "tokenizer_fingerprint is" in text and "dataset_fingerprint is" in text


class Prints(L.Callback):
    """On one rank alone."""


def fit_with_legal_differences() -> tuple[list[str], int]:
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    run = Run(
        module={"temperature": float(rank)},
        trainer={
            "callbacks": [ModelCheckpoint(f"/tmp/rank{rank}", f"rank{rank}", save_top_k=0)] + [Prints()] * rank,
            "logger": DictLogger() if rank else False,
        },
        environment={"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": f"rank{rank}", "NCCL_SOCKET_IFNAME": f"eth{rank}"},
    )
    with warnings.catch_warnings(record=True) as caught, circumstances(run):
        warnings.simplefilter("always")
        trainer, start = prepared(run)
        start()
    return [str(w.message) for w in caught if "Ranks" in str(w.message)], trainer.global_step


def test_what_may_differ_is_told_at_most() -> None:
    (told, steps), *others = on_ranks(2, fit_with_legal_differences)
    assert steps == 3 and others == [([], 3)]
    assert [text.split(": ", 1)[1] for text in told] == [
        "the list of callbacks is Prints on rank 1 and empty on rank 0",
        "temperature is 1.0 on rank 1 and 0.0 on rank 0",
    ]


class LogsWhatItHas(Small):
    """A name of an epoch that a rank first logs in another step than the others do."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx >= self.trainer.global_rank:
            self.log("some", loss.detach(), sync_dist=True, on_step=False, on_epoch=True)
        return loss


def fit_again_and_again() -> list[int]:
    steps = []
    for module in (LogsWhatItHas(), Small(logs=["a"], validation_logs=["b"])):
        trainer = quiet(devices=2, strategy=tex.TexMoEStrategy(tensor_parallel_size=1), max_epochs=1)
        for epochs in (1, 2):
            trainer.fit_loop.max_epochs = epochs
            trainer.fit(module, loader(batches(3)), loader(batches(2)))
        trainer.validate(module, loader(batches(2)), verbose=False)
        steps.append(trainer.global_step)
    return steps


def test_runs_after_each_other_compare_anew() -> None:
    assert on_ranks(2, fit_again_and_again) == [[4, 4]] * 2


def warned_of_loaders(shared: bool) -> list[str]:
    rank = int(os.environ["RANK"])
    trainer = quiet(devices=2, strategy=tex.TexMoEStrategy(), max_epochs=1, use_distributed_sampler=shared)
    samples = [(inputs[0], labels[0]) for inputs, labels in batches(8 + 4 * rank)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Small(), DataLoader(samples, batch_size=2 if shared else 2 + rank))
    return [str(w.message) for w in caught if "data loaders" in str(w.message)]


@pytest.mark.parametrize(
    ("shared", "words"),
    [
        (True, "number of samples in the whole data set is 12 on rank 1 and 8 on rank 0"),
        (False, "batch_size is 2 on rank 0 and 3 on rank 1"),
    ],
)
def test_loaders_that_differ_are_told(shared: bool, words: str) -> None:
    (told, *_), others = on_ranks(2, warned_of_loaders, shared)
    assert words in told and others == []
