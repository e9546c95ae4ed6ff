"""Speed of the kernels of a step, with all ranks at work at once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from lightning_tex.bench.moments import synchronise
from lightning_tex.layers import RMSNorm


class Sizes(NamedTuple):
    """What is measured on a device.

    Args:
        squares: widths of the square products of which the fastest counts.
        narrow: widths of a layer, the smallest size of its products.
        rows: tokens of such a layer.
        width: of the activations between products.
        length, head_dim: of attention.
        copied: elements of the copy.
    """

    squares: tuple[int, ...]
    narrow: tuple[int, ...]
    rows: int
    width: int
    length: int
    head_dim: int
    copied: int


SIZES = {
    "cpu": Sizes((512, 1024), (64, 256, 512), 2048, 256, 256, 64, 1 << 24),
    "cuda": Sizes((4096, 8192), (256, 1024, 2048), 16384, 4096, 2048, 128, 1 << 28),
}


@dataclass(frozen=True)
class Clock:
    """Medians of what all ranks do at once; the slowest rank's counts.

    Args:
        device: ``cpu`` or ``cuda``.
        turns: of which the median counts.
    """

    device: str
    turns: int

    def seconds(self, work: Callable[[], Any], repeat: int = 1) -> float:
        """Of one call, mean of ``repeat`` calls in a row, median over turns."""
        work()
        measured = []
        for _ in range(self.turns):
            dist.barrier()
            synchronise(torch.device(self.device))
            start = time.perf_counter()
            for _ in range(repeat):
                work()
            synchronise(torch.device(self.device))
            measured.append((time.perf_counter() - start) / repeat)
        slowest = torch.tensor(statistics.median(measured), device=self.device, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return float(slowest)


@dataclass(frozen=True)
class Kernels:
    """Rates of a device's kernels; every method is collective over the world.

    Args:
        clock: how it is timed.
    """

    clock: Clock

    @property
    def sizes(self) -> Sizes:
        return SIZES[self.clock.device]

    def _random(self, *shape: int, dtype: torch.dtype = torch.float32, leaf: bool = False) -> torch.Tensor:
        return torch.randn(shape, device=self.clock.device).to(dtype).requires_grad_(leaf)

    def square_flops(self, dtype: torch.dtype) -> float:
        """FLOP/s of the fastest square product."""
        best = 0.0
        for width in self.sizes.squares:
            a = self._random(width, width, dtype=dtype)
            out = torch.empty_like(a)
            best = max(best, 2 * width**3 / self.clock.seconds(lambda a=a, out=out: torch.mm(a, a, out=out), 3))  # type: ignore[misc]
        return best

    def narrow_flops(self, dtype: torch.dtype) -> dict[int, float]:
        """FLOP/s of the three products of a layer D -> 4 D in a training step, by D."""
        found = {}
        for width in self.sizes.narrow:
            x, weight = (self._random(rows, width, dtype=dtype) for rows in (self.sizes.rows, 4 * width))

            def step(x: torch.Tensor = x, weight: torch.Tensor = weight) -> None:
                y = x @ weight.t()
                y @ weight
                y.t() @ x

            found[width] = 3 * 2 * self.sizes.rows * 4 * width**2 / self.clock.seconds(step)
        return found

    def attention_flops(self, dtype: torch.dtype) -> float:
        """FLOP/s of causal attention, forward and backward, the half that is seen counted: 2 products, then 5."""
        length, dim, heads = self.sizes.length, self.sizes.head_dim, 32
        q, k, v = (self._random(1, heads, length, dim, dtype=dtype, leaf=True) for _ in range(3))
        grad = torch.ones_like(q)

        def step() -> None:
            F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(grad)

        return 7 * heads * length * length * dim / self.clock.seconds(step)

    def pass_bandwidth(self, dtype: torch.dtype) -> float:
        """Bytes per second of a norm, an activation and a residual, forward and backward, as the planner counts them.

        A norm reads and writes its input, an activation too, a residual takes three passes; a backward is two forwards.
        """
        rows, width = self.sizes.rows, self.sizes.width
        x, hidden = (self._random(rows, n * width, dtype=dtype, leaf=True) for n in (1, 4))
        norm = RMSNorm(width, device=self.clock.device, dtype=dtype)
        grads = torch.ones_like(x), torch.ones_like(hidden)

        def step() -> None:
            torch.autograd.backward((x + norm(x), F.gelu(hidden)), grads)

        passes = 3 * (2 + 3 + 4 * 2)
        return passes * x.numel() * x.element_size() / self.clock.seconds(step)

    def memory_bandwidth(self) -> float:
        """Bytes per second that a copy reads and writes."""
        a = torch.zeros(self.sizes.copied, device=self.clock.device)
        b = torch.ones_like(a)
        return 2 * a.numel() * a.element_size() / self.clock.seconds(lambda: b.copy_(a))
