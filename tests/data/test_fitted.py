"""Whole documents in rows: every token predicted once, by best fit, and training as each document alone does."""

from __future__ import annotations

import functools
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_tex import LanguageModel
from lightning_tex.data.fitted import FittedDocuments, pieces_of
from lightning_tex.data.order import Share
from lightning_tex.errors import UserValueError
from lightning_tex.models import DecoderConfig

pytestmark = [pytest.mark.filterwarnings("ignore:.*does not have many workers")]


@given(lengths=st.lists(st.integers(1, 30), max_size=20), width=st.integers(1, 12))
def test_pieces_predict_every_token_but_the_first_of_a_document_once(lengths: list[int], width: int) -> None:
    ends = np.cumsum(lengths, dtype=np.int64)
    starts, stops = pieces_of(ends, width)
    predicted = list(chain(*(range(start + 1, stop) for start, stop in zip(starts, stops, strict=True))))
    firsts = {0, *ends.tolist()}
    assert predicted == [token for token in range(sum(lengths)) if token not in firsts]
    assert all(2 <= stop - start <= width + 1 for start, stop in zip(starts, stops, strict=True))


@pytest.fixture
def fitted(make: Any) -> Any:
    return lambda **options: make(**{"packing": "fit", "sequence_length": 64, "global_batch_size": 4, **options})


@pytest.mark.parametrize("width", [64, 512], ids=["parts of documents", "several documents"])
def test_rows_hold_whole_documents(fitted: Any, width: int) -> None:
    data = fitted(sequence_length=width)
    rows = data.prepared.train
    assert isinstance(rows, FittedDocuments)
    stream = rows.conversations.stream
    expected = sorted(stream.read(a, b).tolist() for a, b in zip(*pieces_of(stream.ends(), width), strict=True))
    found = []
    for sample in range(len(rows)):
        batch = rows[[sample]]
        for segment in range(int(batch["segments"].max()) + 1):
            mine = (batch["segments"] == segment) & (batch["attention_mask"] == 1)
            found.append([*batch["input_ids"][mine].tolist(), int(batch["labels"][mine][-1])])
            assert batch["labels"][mine][:-1].tolist() == batch["input_ids"][mine][1:].tolist()
        assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert sorted(found) == expected
    assert data.document_mask
    text = data.prepared.describe()[0]
    assert text.startswith(
        f"train: {stream.documents} documents, {len(stream):,} tokens, {len(rows)} rows of {width}, "
    )
    padding = 100 * (1 - sum(len(piece) - 1 for piece in expected) / (len(rows) * width))
    assert text.endswith(f", {padding:.1f} % of which is padding")


def test_the_same_on_every_data_axis_and_gone_on_with(fitted: Any) -> None:
    alone = [batch["sample"].tolist() for batch in fitted().train_dataloader()]
    for ranks in (2, 4):
        shares = []
        for rank in range(ranks):
            data = fitted()
            data._share = functools.partial(Share, 4, ranks, rank)
            shares.append([batch["sample"].tolist() for batch in data.train_dataloader()])
        assert [list(chain(*parts)) for parts in zip(*shares, strict=True)] == alone
    data = fitted()
    iterator = iter(data.train_dataloader())
    first = [next(iterator)["sample"].tolist() for _ in range(3)]
    again = fitted()
    again.load_state_dict(data.state_dict())
    assert first + [batch["sample"].tolist() for batch in again.train_dataloader()] == alone


def test_a_document_trains_as_alone(fitted: Any) -> None:
    torch.manual_seed(1)
    rows = fitted(sequence_length=512).prepared.train
    sizes = {"dim": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "num_experts": 2, "max_sequence_length": 512}
    model = LanguageModel(DecoderConfig(300, **sizes))
    model.configure_model()
    model.double()
    sample = next(i for i in range(len(rows)) if int(rows[[i]]["segments"].max()) > 0)
    packed = rows[[sample]]
    total, count = model._loss_sum(packed)
    alone = torch.zeros(2, dtype=torch.float64)
    for segment in range(int(packed["segments"].max()) + 1):
        mine = (packed["segments"] == segment) & (packed["attention_mask"] == 1)
        one, tokens = model._loss_sum({name: packed[name][mine][None] for name in ("input_ids", "labels")})
        alone += torch.stack([one, tokens.double()]).detach()
    assert torch.allclose(torch.stack([total, count.double()]), alone, rtol=1e-10)


def test_the_order_of_cut_blocks_is_another_one(fitted: Any) -> None:
    state = fitted().state_dict()
    other = fitted(packing="cut")
    other.load_state_dict(state)
    with pytest.raises(UserValueError, match="the data set has changed: fingerprint"):
        other.train_dataloader()
    with pytest.raises(UserValueError, match="packing='fit' with streaming=True; legal: packing='cut'"):
        fitted(streaming=True)
