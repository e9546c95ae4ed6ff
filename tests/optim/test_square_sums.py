"""Sums of squares: accurate, by what a norm counts, with infinities seen, and in few launches however large."""

from types import SimpleNamespace

import pytest
import torch
from helpers.launches import Launches

from lightning_tex.optim.flat_sizes import bucketed, part_length
from lightning_tex.optim.square_sums import square_sums
from lightning_tex.parallel.device import pretend_device


def gradients(own, counted=True, divisor=1):
    return SimpleNamespace(own=own, divisor=divisor, buffer=SimpleNamespace(counted=counted))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_counted_and_everything(device):
    torch.manual_seed(0)
    parts = [torch.randn(1_000_064) * 1e-3, torch.randn(64, dtype=torch.float64), torch.randn(640).bfloat16()]
    buffers = [gradients(parts[0], divisor=2), gradients(parts[1], counted=False), gradients(parts[2], divisor=3)]
    squares = [buffer.own.double().square().sum() / buffer.divisor**2 for buffer in buffers]
    with pretend_device(device):
        found = square_sums(buffers, torch.device("cpu"))
    expected = torch.stack([squares[0] + squares[2], sum(squares)])
    torch.testing.assert_close(found, expected, rtol=1e-7 if device == "cpu" else 1e-3, atol=0)


def test_64_bit_gradients_are_summed_in_64_bits():
    own = torch.randn(1 << 20, dtype=torch.float64)
    found = square_sums([gradients(own)], own.device)
    torch.testing.assert_close(found, own.square().sum().expand(2), rtol=1e-13, atol=0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_is_seen_and_leaves_alone_what_is_counted(bad):
    copies = torch.ones(640)
    copies[17] = bad
    found = square_sums([gradients(copies, counted=False), gradients(torch.ones(64))], copies.device)
    assert found[0] == 64 and not found[1].isfinite()


def test_without_gradients_the_sums_are_zero():
    assert square_sums([], torch.device("cpu")).tolist() == [0, 0]


@pytest.mark.parametrize("replicas", [1, 8, 64])
def test_launches_do_not_grow_with_the_gradients(replicas):
    layers = [replicas * 10**7] * 100  # 10^9 elements of this rank
    parts = [part_length(layers[span], replicas) for span in bucketed(layers, replicas)]
    buffers = [gradients(torch.empty(part, dtype=torch.bfloat16, device="meta"), divisor=replicas) for part in parts]
    buffers.append(gradients(torch.empty(1 << 20, device="meta"), counted=False))
    with pretend_device("cuda"), Launches() as asked:
        square_sums(buffers, torch.device("meta"))
    assert asked.count <= 12, asked.names


@pytest.mark.parametrize("value", [1e18, float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_that_are_not_exact_tell_what_is_finite(dtype, value):
    own = torch.full((1 << 12,), 6e4, dtype=dtype)  # the norm is no fp16 number
    own[5] = value if dtype != torch.float16 or value != 1e18 else 6e4
    found = square_sums([gradients(own)], own.device, exact=False)
    assert found.isfinite().all() == bool(own.isfinite().all())
