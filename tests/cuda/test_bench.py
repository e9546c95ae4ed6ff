"""What the benches count on a GPU, on work whose counts are known."""

from __future__ import annotations

import pytest
import torch
from helpers.on_a_gpu import DEVICE, IS_GPU
from torch import Tensor

from lightning_tex.bench.counting import kept_bytes, launches, synchronisations
from lightning_tex.bench.moments import LargeProduct, peak, synchronise
from lightning_tex.bench.part_timeline import Part, PartTimeline
from lightning_tex.planner.cluster import Cluster

ELEMENTS = 1 << 20


def test_launches_are_kernels_forward_and_backward() -> None:
    x = torch.randn(ELEMENTS, device=DEVICE, requires_grad=True)
    y, forward = launches(lambda: x.exp().sin(), DEVICE)
    assert forward == 2
    grad = torch.ones_like(y)
    _, backward = launches(lambda: y.backward(grad), DEVICE)
    assert 3 <= backward <= 6  # cos, two multiplications, the gradient's own


@pytest.mark.skipif(not IS_GPU, reason="nothing is waited for")
def test_waits_are_counted_also_in_a_backward() -> None:
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            return grad * float(grad.sum())

    x = torch.randn(8, device=DEVICE, requires_grad=True)
    y, none = synchronisations(lambda: Reads.apply(x * 2), DEVICE)
    assert none == 0
    _, one = synchronisations(lambda: y.backward(torch.ones_like(y)), DEVICE)
    assert one == 1
    _, two = synchronisations(lambda: (x.sum().item(), x.max().item()), DEVICE)
    assert two == 2


def test_kept_bytes_are_those_of_saved_tensors() -> None:
    x = torch.randn(ELEMENTS, device=DEVICE, requires_grad=True)
    y, kept = kept_bytes(lambda: x.exp().sin(), DEVICE)
    assert kept == 2 * 4 * ELEMENTS  # what exp gave, for both, and the result
    y.sum().backward()


def test_time_is_the_devices_and_peaks_are_known() -> None:
    product = LargeProduct(DEVICE, torch.bfloat16)
    timeline = PartTimeline(DEVICE)
    timeline.phase(Part("rest", "forward"))
    timeline.enter("MoE")
    for _ in range(10):
        torch.mm(product.square, product.square)
    timeline.leave("MoE")
    timeline.stop()
    synchronise(DEVICE)
    seconds = timeline.read()
    # Ten products take the time of ten, though nothing waited for the first; their rate is the product's.
    assert seconds[Part("MoE", "forward")] > 5 * 2 * product.width**3 / product.flops
    known, found = Cluster.of_device(DEVICE), peak(DEVICE, "bf16-mixed", product)
    assert product.flops < 1.05 * found["flops_per_second"]
    assert found["of"] == ("a product of this run" if known is None else f"the data sheet of {known.name}")
