"""Global batches: which tensors are shared among data ranks, and which data is refused."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_tex.errors import UserValueError
from lightning_tex.testing.batches import joined, require_samples, same_samples, samples_of, slice_of


@dataclass
class Pair:
    x: Tensor
    name: str = "pair"


def test_a_dataclass_is_shared_and_keeps_what_is_no_tensor():
    part = slice_of(Pair(torch.arange(6)), 1, 3)
    assert part.x.tolist() == [2, 3] and part.name == "pair"


def test_only_tensors_whose_first_dim_is_the_samples_are_shared():
    batch = {"x": torch.arange(8).view(4, 2), "weights": torch.arange(3), "mask": torch.ones(1, 2), "scale": 2.0}
    parts = [slice_of(batch, rank, 2) for rank in range(2)]
    assert parts[1]["x"].tolist() == [[4, 5], [6, 7]]
    assert parts[1]["weights"].tolist() == [0, 1, 2] and parts[1]["mask"].shape == (1, 2)
    assert [t.tolist() for t in joined(parts)] == [batch["x"].tolist(), [0, 1, 2], [[1, 1]]]
    assert same_samples(batch, {**batch, "x": batch["x"].flip(0)})
    assert not same_samples(batch, {**batch, "x": batch["x"] + 1})


def test_samples_that_cannot_be_shared_evenly():
    with pytest.raises(UserValueError, match=r"a batch of 5 samples .* 2 data ranks; legal: a multiple of 2 samples"):
        slice_of([torch.ones(5)], 0, 2)


@pytest.mark.parametrize("batch", [np.ones(4), object(), {"x": np.ones(4)}, [1.0, 2.0], torch.ones(())])
def test_batches_without_samples_are_refused(batch):
    assert samples_of(batch) == 0
    with pytest.raises(UserValueError, match="legal: tensors, mappings, tuples, lists and dataclasses of them"):
        require_samples([torch.ones(4), batch])


def test_no_batches_are_refused():
    with pytest.raises(UserValueError, match="the data gave no batches"):
        require_samples([])
