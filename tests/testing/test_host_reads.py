"""The counter of host reads that other tests rely on."""

import pytest
import torch
from helpers.host_reads import host_reads
from torch import Tensor

READS = {
    "item": lambda x: x.sum().item(),
    "int": lambda x: int(x.sum()),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool(x.any()),
    "index": lambda x: [0, 1, 2][x.argmin()],
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "mask": lambda x: x[x > 0],
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.bincount(),
    "repeat_interleave": lambda x: x.repeat_interleave(x),
    "equal": lambda x: torch.equal(x, x),
    "upload": lambda x: torch.tensor([1, 2], device=x.device),
    "size": lambda x: torch.full((2,), x[0]),
}
NO_READS = {
    "shape": lambda x: x.view(-1).shape[0] + len(x),
    "take": lambda x: x[torch.arange(2)],
    "masked_fill": lambda x: x.masked_fill(x > 0, 0),
    "where": lambda x: torch.where(x > 0, x, 0),
    "repeat_interleave": lambda x: x.repeat_interleave(x, output_size=6),
    "new": lambda x: torch.tensor([1, 2]),
}


@pytest.mark.parametrize("name", READS)
def test_a_read_counts_once(name: str) -> None:
    x = torch.tensor([1, 2, 3])
    with host_reads() as reads:
        READS[name](x)
    assert len(reads) == 1, reads
    assert reads[0].place.startswith("testing/test_host_reads.py:")


@pytest.mark.parametrize("name", NO_READS)
def test_what_waits_for_nothing_does_not_count(name: str) -> None:
    x = torch.tensor([1, 2, 3])
    with host_reads() as reads:
        NO_READS[name](x)
    assert not reads


def test_reads_of_a_backward_count() -> None:
    class Reading(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            grad.tolist()
            return grad * float(grad[0])

    loss = Reading.apply(torch.ones(2, requires_grad=True)).sum()
    with host_reads() as reads:
        loss.backward()
    assert [read.what for read in reads] == ["tolist", "aten._local_scalar_dense"]


def test_only_chosen_tensors_count_and_nothing_does_afterwards() -> None:
    x, y = torch.ones(2), torch.zeros(3)
    with host_reads(lambda tensor: len(tensor) == 3) as reads:
        x.tolist()
        y.tolist()
    y.tolist()
    assert len(reads) == 1
