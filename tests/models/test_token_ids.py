"""Ids and labels that the vocabulary does not have: refused by name, on every layout, while they are in host memory."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers.behaviour_modules import TED, new_trainer
from helpers.ranks import on_ranks
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_tex import LanguageModel
from lightning_tex.data import require_token_ids
from lightning_tex.errors import UserIndexError
from lightning_tex.layers import VocabParallelEmbedding
from lightning_tex.models import DecoderConfig
from lightning_tex.testing.ranks import RanksFailed

VOCABULARY = 61


def batch(**changes: Any) -> dict[str, Tensor]:
    """Four rows of six tokens; ``changes``: (row, position, value) by name."""
    ids = torch.arange(4 * 7).view(4, 7) % VOCABULARY
    made = {"input_ids": ids[:, :-1].clone(), "labels": ids[:, 1:].clone(), "sample": torch.tensor([7, 3, 9, 1])}
    for name, (row, position, value) in changes.items():
        made[name][row, position] = value
    return made


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"input_ids": (2, 4, 61)},
            "input_ids[2, 4] (sample 9) is 61, and the vocabulary has 61 tokens; legal: 0 to 60.",
        ),
        ({"input_ids": (0, 0, -1)}, "input_ids[0, 0] (sample 7) is -1,"),
        ({"input_ids": (3, 5, -100)}, "input_ids[3, 5] (sample 1) is -100,"),
        ({"labels": (1, 0, 70_000)}, "legal: 0 to 60, or -100 where nothing is predicted"),
        ({"labels": (1, 0, -1)}, "labels[1, 0] (sample 3) is -1,"),
    ],
    ids=str,
)
def test_what_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserIndexError, match=f"^here: .*{re.escape(words)}"):
        require_token_ids(batch(**changes), VOCABULARY, where="here")


def test_what_is_legal() -> None:
    require_token_ids(batch(labels=(0, 0, -100)), VOCABULARY)
    require_token_ids(batch(labels=(0, 0, -1)), VOCABULARY, ignore_index=-1)
    require_token_ids({"input_ids": torch.full((2, 2), 60, dtype=torch.int32)}, VOCABULARY)
    require_token_ids({"input_ids": torch.zeros(0, 5, dtype=torch.int64), "labels": None}, VOCABULARY)
    require_token_ids({"input_ids": torch.full((2, 2), 99.0)}, VOCABULARY)  # no ids but embeddings


def test_an_embedding_alone() -> None:
    with pytest.raises(IndexError, match="token ids must be between 0 and 60; found 3 to 61"):
        VocabParallelEmbedding(VOCABULARY, 4)(torch.tensor([3, 61]))


def fit(layout: dict[str, Any] | None, stage: str, changes: dict[str, Any]) -> None:
    """The third batch of the last data rank is bad."""
    config = DecoderConfig(VOCABULARY, dim=16, num_layers=2, num_heads=2, hidden_dim=16, num_experts=4)
    trainer = new_trainer(layout, num_sanity_val_steps=0)
    good = [batch() for _ in range(4)]
    spread = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
    last = spread["rank"] == spread["num_replicas"] - 1
    bad = [*good[:2], batch(**changes), good[3]] if last else good
    train, validation = (bad, good) if stage == "train" else (good, bad)
    trainer.fit(LanguageModel(config), DataLoader(train, batch_size=None), DataLoader(validation, batch_size=None))


@pytest.mark.parametrize(
    ("stage", "changes"),
    [("train", {"input_ids": (2, 4, 61)}), ("validate", {"labels": (2, 4, -5)})],
    ids=["ids in training", "labels in validation"],
)
def test_every_layout_ends(stage: str, changes: dict[str, Any]) -> None:
    name, (_, _, value) = next(iter(changes.items()))
    with pytest.raises(RanksFailed) as caught:
        on_ranks(4, fit, TED, stage, changes)
    assert not caught.value.hung and not caught.value.outcomes
    for rank in (2, 3):  # of one tensor group
        assert f"rank {rank}, {stage} batch 2 of epoch 0: {name}[2, 4] (sample 9) is {value}," in str(caught.value)


def test_one_process() -> None:
    with pytest.raises(
        RanksFailed, match=r"UserIndexError: rank 0, train batch 2 of epoch 0: input_ids\[2, 4\] \(sample 9\) is 61"
    ):
        on_ranks(1, fit, None, "train", {"input_ids": (2, 4, 61)})
