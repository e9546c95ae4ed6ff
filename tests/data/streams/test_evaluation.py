"""What is held out of a stream: the same batches on every data axis, each document tokenised by one rank."""

from __future__ import annotations

from itertools import chain
from typing import Any

import lightning as L
import pytest
from helpers.behaviour_modules import new_trainer
from helpers.cases import case
from helpers.ranks import on_ranks

from lightning_tex import LanguageModel
from lightning_tex.data.tokenizer import TextTokenizer
from lightning_tex.models import DecoderConfig

OPTIONS: dict[str, Any] = {"document_mask": True, "validation_fraction": 0.2}


def rows_of(batches: list[Any]) -> dict[int, tuple[list[int], list[int]]]:
    """Inputs and labels, by sample."""
    rows: dict[int, tuple[list[int], list[int]]] = {}
    for batch in batches:
        for sample, *row in zip(*(batch[name].tolist() for name in ("sample", "input_ids", "labels")), strict=True):
            if sample < 0:
                assert set(row[1]) == {-100}
            else:
                assert sample not in rows
                rows[sample] = (row[0], row[1])
    return rows


@pytest.mark.parametrize("parts", [1, 4, 8])
def test_batches_on_every_data_axis(ranks: Any, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    encode = TextTokenizer.encode
    monkeypatch.setattr(TextTokenizer, "encode", lambda self, text: encoded.append(text) or encode(self, text))
    alone = list(ranks.module(stream_parts=parts, **OPTIONS).val_dataloader())
    expected, documents = rows_of(alone), sorted(encoded)
    names = {text.split()[0] for text in documents}
    assert len(names) == len(documents) > parts
    assert len(expected) == sum((batch["sample"] >= 0).sum() for batch in alone)
    for count in (1, 2, 4, 8):
        with case(ranks=count):
            encoded.clear()
            modules = [ranks.module(rank, count, stream_parts=parts, **OPTIONS) for rank in range(count)]
            shares = [list(module.val_dataloader()) for module in modules]
            assert rows_of(list(chain(*shares))) == expected
            assert all(len(share) >= 1 and len(share[0]["sample"]) == 8 // count for share in shares)
            assert sorted(encoded) == sorted(documents * max(1, count // parts))


def test_a_worker_reads_the_same(ranks: Any) -> None:
    batches, others = (list(ranks.module(num_workers=n, **OPTIONS).val_dataloader()) for n in (0, 1))
    assert rows_of(batches) == rows_of(others)


class Model(LanguageModel):
    def __init__(self) -> None:
        super().__init__(DecoderConfig(300, dim=16, num_layers=2, num_heads=2, hidden_dim=16, num_experts=2))


def loss(ranks: Any, layout: Any, fraction: float) -> tuple[float, int]:
    """And the batches of this rank."""
    data = ranks.module(**{**OPTIONS, "validation_fraction": fraction})
    del data._share
    L.seed_everything(1, verbose=False)
    trainer = new_trainer(layout, limit_val_batches=1.0)
    (metrics,) = trainer.validate(Model(), datamodule=data, verbose=False)
    return metrics["val_loss"], len(list(data.val_dataloader()))


@pytest.mark.parametrize(
    "fraction", [0.2, pytest.param(0.02, marks=pytest.mark.full)], ids=["uneven", "ranks without documents"]
)
def test_losses_are_those_of_one_process_where_ranks_end_at_different_times(ranks: Any, fraction: float) -> None:
    ((alone, _),) = on_ranks(1, loss, ranks, None, fraction)
    found = on_ranks(4, loss, ranks, {"tensor_parallel_size": 1, "expert_parallel_size": 2}, fraction)
    assert [value for value, _ in found] == pytest.approx([alone] * 4, rel=1e-6)
    assert len({count for _, count in found}) > 1 or fraction < 0.1
