"""Moments on a device, and the peak of its arithmetic that speeds are compared with."""

from __future__ import annotations

import time
from typing import Any

import torch

from lightning_tex.planner.cluster import Cluster
from lightning_tex.strategy.training_flops import peak_flops

_PRODUCT_WIDTH = {"cpu": 1024, "cuda": 8192}
_PRODUCTS = 5


class Moment:
    """Now, on a device: a later one minus an earlier one is seconds.

    On CUDA an event on the current stream, for which nothing waits; its time is known once the device was waited for.

    Args:
        device: whose.
    """

    def __init__(self, device: torch.device) -> None:
        self.at: Any
        if device.type == "cuda":
            self.at = torch.cuda.Event(enable_timing=True)
            self.at.record()
        else:
            self.at = time.perf_counter()

    def __sub__(self, earlier: Moment) -> float:
        if isinstance(self.at, float):
            return self.at - float(earlier.at)
        return float(earlier.at.elapsed_time(self.at)) / 1e3


def synchronise(device: torch.device) -> None:
    """Wait for what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class LargeProduct:
    """A square product that is timed now and then beside what is measured.

    Args:
        device, dtype: of its matrices.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.width = device, _PRODUCT_WIDTH[device.type]
        self.square = torch.randn(self.width, self.width, device=device).to(dtype)
        self.best = float("inf")

    def time(self) -> None:
        """Once more, after one that is not timed."""
        torch.mm(self.square, self.square)
        begin = Moment(self.device)
        torch.mm(self.square, self.square)
        end = Moment(self.device)
        synchronise(self.device)
        self.best = min(self.best, end - begin)

    @property
    def flops(self) -> float:
        """FLOP/s of the fastest."""
        if self.best == float("inf"):
            for _ in range(_PRODUCTS):
                self.time()
        return 2 * self.width**3 / self.best


def peak(device: torch.device, precision: str, product: LargeProduct) -> dict[str, Any]:
    """What shares are of: the data sheet's figure for the device and precision, or else a product that was measured."""
    sheet = peak_flops(device, precision)
    if sheet is None:
        return {"flops_per_second": product.flops, "of": "a product of this run"}
    known = Cluster.of_device(device)
    assert known is not None
    return {"flops_per_second": sheet, "of": f"the data sheet of {known.name}"}
